#!/usr/bin/env python3
"""Fuzzes attention for as long as wanted, and records what was run: ``scripts/fuzz.py --cases 10000``.

Cases are drawn as in ``tests/test_fuzz.py``, seeds counting up from ``--first``; each is held against the float64
reference. ``--triton`` runs the Triton kernels in the interpreter instead, on smaller cases. A case that fails is
printed with its seed, and the exit code is 1. ``--record FILE`` adds what was run to a JSON file; mismatches that were
found earlier, and mended, are those of ``tests/fuzz_seeds.json``.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the cases; returns 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many, over all kinds (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed of every kind (default: 0)")
    parser.add_argument("--kinds", nargs="+", help="of the kinds only these")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels, in the interpreter")
    parser.add_argument("--record", type=Path, help="JSON file to add the record to")
    arguments = parser.parse_args()
    if arguments.triton:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    import transformers
    from fuzz_checks import KINDS, check
    from fuzz_triton import KERNELS, check_kernel

    import nc_patch
    from eval_tasks.provenance import commit
    from nc_patch.common import check_directory

    if arguments.record is not None:
        check_directory(arguments.record.parent, [arguments.record.name])
    torch.set_num_threads(1)
    shares = dict.fromkeys(KERNELS, 1) if arguments.triton else KINDS
    run = check_kernel if arguments.triton else check
    unknown = sorted(set(arguments.kinds or ()) - set(shares))
    if unknown:
        parser.error(f"unknown kind {', '.join(unknown)}; allowed are {', '.join(shares)}")
    shares = {kind: share for kind, share in shares.items() if not arguments.kinds or kind in arguments.kinds}
    counts = {kind: max(1, round(arguments.cases * share / sum(shares.values()))) for kind, share in shares.items()}
    measured_commit = commit()
    failed: list[str] = []
    done: Counter[str] = Counter()
    began = time.monotonic()
    for kind, count in counts.items():
        for seed in range(arguments.first, arguments.first + count):
            try:
                said = run(kind, seed)
            except Exception:  # a crash is a finding, and the next case is run
                said = f"{kind} {seed}: {traceback.format_exc()}"
            done[kind] += 1
            if said is not None:
                failed.append(said)
                print(said, flush=True)
        print(f"{kind}: {count} cases, {len(failed)} failed so far, {time.monotonic() - began:.0f} s", flush=True)
    if arguments.record is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "nc_patch": nc_patch.__version__}
        versions["transformers"] = transformers.__version__
        if arguments.triton:
            import triton

            versions["triton"] = triton.__version__
        record = {
            "command": " ".join(["scripts/fuzz.py", *sys.argv[1:]]),
            "commit": measured_commit,
            "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions,
            "first_seed": arguments.first,
            "cases": sum(done.values()),
            "cases_by_kind": dict(done),
            "failed": failed,
            "seconds": round(time.monotonic() - began),
        }
        add_record(arguments.record, record)
    return 1 if failed else 0


def add_record(path: Path, record: dict) -> None:
    """Adds one run to the record, beside what earlier runs had found."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    known["runs"].append(record)
    known["cases_without_a_mismatch"] = sum(run["cases"] - len(run["failed"]) for run in known["runs"])
    seeds = json.loads((ROOT / "tests" / "fuzz_seeds.json").read_text(encoding="utf-8"))
    known["found_and_mended"] = [{"kind": kind, "seed": seed, "what": what} for kind, seed, what in seeds["failed"]]
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
