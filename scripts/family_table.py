"""Puts every causal language model of the installed transformers through the suite: docs/results/families.json.

Takes some minutes. Exits with 1, and writes nothing, where a family is neither right nor refused. Afterwards
``python scripts/build_docs_tables.py`` writes the tables of docs/families.md.
"""

import dataclasses
import logging
import sys
from pathlib import Path

import torch
from frame import Measurement

sys.path += [str(Path(__file__).parents[1] / part) for part in ("tests", "tests/families")]

from family_shapes import families
from family_suite import examine


def main() -> None:
    frame = Measurement(__doc__, "families.json")
    frame.start()
    torch.set_num_threads(1)
    logging.getLogger("nc_patch").setLevel(logging.ERROR)
    outcomes = []
    for family in families():
        outcomes.append(outcome := examine(family))
        print(
            f"{family.name}: {'; '.join(outcome.wrong) or outcome.refused or outcome.not_built or 'supported'}",
            flush=True,
        )
    if wrong := [outcome.name for outcome in outcomes if outcome.wrong]:
        sys.exit(f"{len(wrong)} families are wrong: {', '.join(wrong)}")
    frame.save(families=[dataclasses.asdict(outcome) for outcome in outcomes])


if __name__ == "__main__":
    main()
