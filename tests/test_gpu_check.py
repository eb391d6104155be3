"""``scripts/gpu_check.sh`` on a GPU that is not there, and with stand-ins for Python and the memory checker."""

import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
from processes import run

CHECK = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.sh"
PARTS = {"prefill": ["tests", "prefill"], "decode": ["graphs", "decode", "sanitizer"]}
# Answers the check of the environment, and ends every other command as it is told to.
STAND_IN = """#!/bin/bash
case "$*" in
    -) cat >/dev/null; echo "gpu ${GPU:-of cardboard}" ;;
    "-m pytest "*) echo "${PYTEST_SAYS-5 passed in 0.10s}"; exit "${PYTEST_ENDS:-0}" ;;
    "-m nc_patch bench "*) exit "${BENCH_ENDS:-0}" ;;
    "tests/pretended_gpu.py "*) exit "${LAUNCHES_END:-0}" ;;
esac
"""
SANITIZER = '#!/bin/bash\necho "========= ERROR SUMMARY: 3 errors"; exit "${SANITIZER_ENDS:-0}"\n'


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_dry_run_compiles_every_launch_and_benches_on_the_cpu_with_few_packages(part, tmp_path):
    run("bash", CHECK, "--dry-run", part, tmp_path, PYTHON=sys.executable)
    summary = (tmp_path / f"gpu_check_{part}.txt").read_text()
    assert [line.split()[:2] for line in summary.splitlines()] == [[step, "dry"] for step in PARTS[part]]
    with tarfile.open(tmp_path / f"gpu_check_{part}.tar.gz") as packed:
        members = [member for member in packed.getmembers() if member.isfile()]
        files = {Path(m.name).name: packed.extractfile(m).read().decode(errors="replace") for m in members}
    collected = re.findall(r"^tests/test_\w+\.py: (\d+)$", files[f"{PARTS[part][0]}.log"], re.M)
    assert sum(map(int, collected)) >= {"prefill": 200, "decode": 5}[part]
    for step in PARTS[part][1:]:
        assert int(re.search(r"sm_90, triton \S+: (\d+) launches", files[f"{step}.log"])[1]) > 30
    rows = json.loads(files[f"{part}.json"])["rows"]
    assert {row["method"] for row in rows if row["status"] == "ok"} >= {"topk", "block", "window"}


@pytest.mark.parametrize(
    ("part", "ends", "status", "line"),
    [
        ("prefill", {"PYTEST_SAYS": "1 failed, 4 passed in 1s", "PYTEST_ENDS": "1"}, 1, "FAILED 1 failed, 4 passed"),
        ("prefill", {"PYTEST_SAYS": "5 skipped in 0.10s"}, 1, "FAILED 5 skipped in 0.10s; see tests.log"),
        ("prefill", {"PYTEST_SAYS": "", "PYTEST_ENDS": "137"}, 1, "FAILED stopped at its time limit: nothing ended"),
        ("decode", {"BENCH_ENDS": "124"}, 0, "decode stopped at its time limit; what was measured is in decode.json"),
        ("decode", {"SANITIZER_ENDS": "99"}, 1, "FAILED ========= ERROR SUMMARY: 3 errors; see sanitizer.log"),
        ("decode", {"GPU": "none", "LAUNCHES_END": "1"}, 1, "decode FAILED a launch for a GPU that is not there"),
    ],
)
def test_how_a_step_ends_is_said_and_the_others_still_run(tmp_path, part, ends, status, line):
    for name, text in (("python", STAND_IN), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    there = {"PYTHON": "python", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    run("bash", CHECK, part, tmp_path / "out", ends=status, **there, **ends)
    text = (tmp_path / "out" / f"gpu_check_{part}.txt").read_text()
    assert line in re.sub(r" +(\d+ s)?  +| +", " ", text)
    assert len(text.splitlines()) == len(PARTS[part])
