"""``scripts/gpu_check.sh`` on machines without a GPU, and with a stand-in for Python that claims to see one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.sh"
# Answers the check of the environment, and ends pytest and bench as it is told to.
STAND_IN = """#!/bin/bash
case "$*" in
    -) cat >/dev/null; echo "gpu of cardboard" ;;
    "-m pytest "*) echo "$PYTEST_SAYS"; exit "$PYTEST_ENDS" ;;
    "-m nc_patch bench decode "*) echo "$@"; exit "$DECODE_ENDS" ;;
    "-m nc_patch bench prefill "*) echo "$@"; exit "$PREFILL_ENDS" ;;
esac
"""


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def on_a_gpu(tmp_path):
    """Runs the check with the stand-in; without compute-sanitizer."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def check(*arguments, tests="5 passed in 0.10s", tests_end=0, decode_ends=0, prefill_ends=0):
        return run(
            *arguments,
            tmp_path / "out",
            PYTHON=str(python),
            PATH="/usr/bin:/bin",
            PYTEST_SAYS=tests,
            PYTEST_ENDS=str(tests_end),
            DECODE_ENDS=str(decode_ends),
            PREFILL_ENDS=str(prefill_ends),
        )

    return check


def test_a_dry_run_collects_the_tests_and_benches_on_the_cpu_with_few_packages(tmp_path):
    done = run("--dry-run", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = [line.split() for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert [line[:2] for line in summary] == [
        [step, "dry"] for step in ("tests", "sanitizer", "bench-decode", "bench-prefill")
    ]
    assert int(summary[0][4]) > 50
    assert "would run: timeout 900" in done.stdout
    assert "--device cuda" in done.stdout
    for name in ("decode", "prefill"):
        record = json.loads((tmp_path / "bench" / f"{name}.json").read_text())
        assert {row["method"] for row in record["rows"] if row["status"] == "ok"} >= {"topk", "block", "window"}
    assert "no plot: matplotlib is not installed" in done.stdout


def test_steps_that_pass_are_summed_up(on_a_gpu, tmp_path):
    done = on_a_gpu()
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "5 passed in 0.10s" in summary
    assert "compute-sanitizer is not there" in summary
    for name in ("decode", "prefill"):
        assert f"bench {name} --out" in (log := (tmp_path / "out" / f"bench-{name}.log").read_text())
        assert "--device cuda --minutes 4 " in log
    assert done.stdout.endswith(summary)


@pytest.mark.parametrize(
    ("ends", "line"),
    [
        ({"tests": "1 failed, 4 passed in 0.10s", "tests_end": 1}, "1 failed, 4 passed in 0.10s; see tests.log"),
        ({"tests": "5 skipped in 0.10s"}, "5 skipped in 0.10s; see tests.log"),
        ({"tests": "Traceback", "tests_end": 4}, "pytest ended with 4; see tests.log"),
        ({"prefill_ends": 1}, "ended with 1; see bench-prefill.log"),
        ({"decode_ends": 1}, "ended with 1; see bench-decode.log"),
    ],
    ids=["test-fails", "all-skipped", "pytest-breaks", "prefill-fails", "decode-fails"],
)
def test_a_step_that_fails_fails_the_check_and_the_others_still_run(on_a_gpu, tmp_path, ends, line):
    done = on_a_gpu(**ends)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(summary) == 4
    assert [row.endswith(line) for row in summary if " FAILED " in row] == [True]


def test_one_step_alone(on_a_gpu, tmp_path):
    assert on_a_gpu("--only", "bench").returncode == 0
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary] == ["bench-decode", "bench-prefill"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--quick",), {}, "unknown option --quick"),
        (("--only", "juggling"), {}, "--only must be one of: tests sanitizer bench; got juggling"),
        (("--only",), {}, "--only needs one of"),
        (("a", "b"), {}, "one OUT is enough"),
        ((), {"MINUTES": "soon"}, "MINUTES must be a whole number"),
        ((), {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python does not run"),
    ],
    ids=["option", "step", "no-step", "outs", "minutes", "python"],
)
def test_what_does_not_fit_is_refused(tmp_path, arguments, environment, message):
    done = run(*(arguments or (tmp_path,)), **environment)
    assert done.returncode == 2
    assert message in done.stderr
