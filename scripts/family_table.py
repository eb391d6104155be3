"""Puts every causal language model of the installed transformers through the suite, and writes docs/families.md.

Usage: python scripts/family_table.py [--out FILE]

Takes some minutes. Exits with 1, and writes nothing, where a family is neither right nor refused.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "families"))

from family_report import TABLE, table
from family_suite import examine
from family_walk import families

from nc_patch.common import check_directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(1)
    logging.getLogger("nc_patch").setLevel(logging.ERROR)
    outcomes = []
    for family in families():
        begun = time.perf_counter()
        outcome = examine(family)
        outcomes.append(outcome)
        said = "; ".join(outcome.wrong) or outcome.refused or outcome.not_built or "supported"
        print(f"{family.name}: {said} ({time.perf_counter() - begun:.1f} s)", flush=True)
    wrong = [outcome.name for outcome in outcomes if outcome.wrong]
    if wrong:
        print(f"{len(wrong)} families are wrong: {', '.join(wrong)}", file=sys.stderr)
        return 1
    arguments.out.write_text(table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
