#!/usr/bin/env python3
"""Fuzzes attention for as long as wanted: ``scripts/fuzz.py --cases 10000``.

Cases are drawn as in ``tests/test_fuzz.py``, seeds counting up from ``--first``; each is held against the float64
reference. ``--triton`` runs the Triton kernels in the interpreter instead, on smaller cases. A case that fails is
printed with its seed, and the exit code is 1.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the cases; returns 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many, over all kinds (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed of every kind (default: 0)")
    parser.add_argument("--kinds", nargs="+", help="of the kinds only these")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels, in the interpreter")
    arguments = parser.parse_args()
    if arguments.triton:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from fuzz_checks import KERNELS, KINDS, check, check_kernel

    torch.set_num_threads(1)
    run, shares = (check_kernel, dict.fromkeys(KERNELS, 1)) if arguments.triton else (check, KINDS)
    kinds = arguments.kinds or list(shares)
    if unknown := sorted(set(kinds) - set(shares)):
        parser.error(f"unknown kind {', '.join(unknown)}; allowed are {', '.join(shares)}")
    failed = 0
    for kind in kinds:
        count = max(1, round(arguments.cases * shares[kind] / sum(shares[each] for each in kinds)))
        for seed in range(arguments.first, arguments.first + count):
            try:
                said = run(kind, seed)
            except Exception:  # a crash is a finding, and the next case is run
                said = f"{kind} {seed}: {traceback.format_exc()}"
            if said is not None:
                failed += 1
                print(said, flush=True)
        print(f"{kind}: {count} cases, {failed} failed so far", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
