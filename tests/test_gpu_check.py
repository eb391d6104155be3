"""``scripts/gpu_check.sh`` on a GPU that is not there, and with stand-ins for Python and the memory checker."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl  # noqa: E402
from pretended_gpu import pretended_gpu  # noqa: E402
from script_modules import load_script  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "scripts" / "gpu_check.sh"
PARTS = {"prefill": ["tests", "prefill"], "decode": ["graphs", "decode", "sanitizer"]}
# Answers the check of the environment, and ends every other command as it is told to.
STAND_IN = """#!/bin/bash
case "$*" in
    -) cat >/dev/null; echo "path $PYTHONPATH"; echo "gpu ${GPU:-of cardboard}" ;;
    "-m pytest "*) echo "$@"; echo "${PYTEST_SAYS-5 passed in 0.10s}"; exit "${PYTEST_ENDS:-0}" ;;
    "-m nc_patch bench "*) echo "$@"; exit "${BENCH_ENDS:-0}" ;;
    "tests/pretended_gpu.py "*) shift; exec "$REAL_PYTHON" -c "$BROKEN" "$@" ;;
esac
"""
SANITIZER = """#!/bin/bash
echo "$@"; echo "========= ERROR SUMMARY: 3 errors"; exit "$SANITIZER_ENDS"
"""
# Runs tests/pretended_gpu.py where every launch of the library passes an argument that no kernel has.
BROKEN = """
import runpy, sys
from triton.runtime.jit import JITFunction
run = JITFunction.run
JITFunction.run = lambda self, *arguments, **options: run(self, *arguments, **options, NO_SUCH_ARGUMENT=1)
sys.path.insert(0, "tests")
runpy.run_path("tests/pretended_gpu.py", run_name="__main__")
"""
# A process of xdist in which the third test breaks the GPU.
LOST = """
import pytest, torch
lost = []
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
@pytest.mark.parametrize("number", range(9))
def test_of_a_kernel(number):
    assert not lost
    if number == 2:
        lost.append(number)
"""


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def with_stand_ins(tmp_path):
    """Runs the check with the stand-ins; without compute-sanitizer unless told how it ends."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "python", STAND_IN)

    def check(*arguments, SANITIZER_ENDS=None, **environment):
        if SANITIZER_ENDS is not None:
            executable(tmp_path / "bin" / "compute-sanitizer", SANITIZER)
            environment["SANITIZER_ENDS"] = SANITIZER_ENDS
        known = {"PYTHON": "python", "REAL_PYTHON": sys.executable, "BROKEN": BROKEN, **environment}
        return run(*arguments, tmp_path / "out", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", **known)

    return check


def summary_of(out, part):
    return [line.split(maxsplit=4) for line in (out / f"gpu_check_{part}.txt").read_text().splitlines()]


def results_of(out, part):
    """The results by name, as text."""
    with tarfile.open(out / f"gpu_check_{part}.tar.gz") as packed:
        files = [member for member in packed.getmembers() if member.isfile()]
        return {Path(member.name).name: packed.extractfile(member).read().decode() for member in files}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_dry_run_compiles_every_launch_and_benches_on_the_cpu_with_few_packages(part, tmp_path):
    done = run("--dry-run", part, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:2] for line in summary_of(tmp_path, part)] == [[step, "dry"] for step in PARTS[part]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"gpu_check_{part}.tar.gz", f"gpu_check_{part}.txt"]
    results = results_of(tmp_path, part)
    collected = sum(map(int, re.findall(r"^tests/test_triton_\w+\.py: (\d+)$", results[f"{PARTS[part][0]}.log"], re.M)))
    assert collected >= {"prefill": 200, "decode": 5}[part]
    launched = {step: re.findall(r"sm_90, triton \S+: (\d+) launches", results[f"{step}.log"]) for step in PARTS[part]}
    assert all(int(count) > 30 for step in PARTS[part][1:] for count in launched[step] or ["0"])
    rows = json.loads(results[f"{part}.json"])["rows"]
    assert {row["method"] for row in rows if row["status"] == "ok"} >= {"topk", "block", "window"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_launch_that_a_gpu_would_refuse_fails_the_dry_run(part, with_stand_ins, tmp_path):
    done = with_stand_ins("--dry-run", part)
    assert done.returncode == 1
    assert [line[1] for line in summary_of(tmp_path / "out", part)] == ["dry", *["FAILED"] * (len(PARTS[part]) - 1)]
    assert "NO_SUCH_ARGUMENT was specified but unrecognised" in done.stdout


@triton.jit
def add_products_kernel(target, ROWS: tl.constexpr, INNER: tl.constexpr):
    rows, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    left = tl.load(target + rows[:, None] * INNER + inner[None, :])
    right = tl.load(target + inner[:, None] * ROWS + rows[None, :])
    tl.store(target + rows[:, None] * ROWS + rows[None, :], tl.dot(left, right).to(tl.bfloat16))


@pytest.mark.parametrize(
    ("grid", "constants", "error", "message"),
    [
        ((7, 2), {"ROWS": 64, "INNER": 64}, None, None),
        ((1,), {"ROWS": 128, "INNER": 1024}, OutOfResources, "shared memory"),
        ((1,), {"ROWS": 64, "INNER": 64, "num_warps": 64}, OutOfResources, "threads"),
        ((1, 65536), {"ROWS": 64, "INNER": 64}, ValueError, "a grid is at most"),
        ((1,), {"ROWS": 64}, TypeError, "INNER"),
        ((1,), {"ROWS": 64, "INNER": 64, "COLUMNS": 64}, KeyError, "COLUMNS"),
    ],
    ids=["sound", "shared-memory", "threads", "grid", "missing-argument", "unknown-argument"],
)
def test_the_pretended_gpu_takes_the_launches_that_a_gpu_takes(grid, constants, error, message):
    target = torch.empty(128 * 1024, dtype=torch.bfloat16)
    with pretended_gpu() as launches:
        if error is None:
            add_products_kernel[grid](target, **constants)
            assert launches == [("add_products_kernel", (7, 2, 1))]
        else:
            with pytest.raises(error, match=message):
                add_products_kernel[grid](target, **constants)
            assert not launches


def test_what_the_memory_checker_watches_is_finite_and_of_every_selection():
    outputs = dict(load_script("small_attention").small_calls(torch.device("cpu")))
    assert all(output.isfinite().all() for output in outputs.values())
    for name in ("prefill block", "prefill topk", "prefill window", "decoding topk", "decoding block"):
        assert any(found.startswith(name) for found in outputs)


def test_a_test_that_breaks_its_gpu_fails_alone_and_by_name(tmp_path):
    (tmp_path / "test_lost.py").write_text(LOST)
    options = ("-q", "-p", "no:cacheprovider", "-p", "conftest", "-p", "xdist.plugin", "-n", "1")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--dist", "worksteal", "test_lost.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "crashed while running 'test_lost.py::test_of_a_kernel[2]'" in done.stdout
    assert "an illegal memory access was encountered" in done.stdout
    assert "1 failed, 9 passed, 1 error" in done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_steps_that_pass_are_summed_up_and_fit_into_six_minutes(part, with_stand_ins, tmp_path):
    done = with_stand_ins(part, PYTHONPATH="/packages/of/mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(text := (tmp_path / "out" / f"gpu_check_{part}.txt").read_text())
    assert "5 passed in 0.10s" in text
    assert ("compute-sanitizer is not there" in text) == (part == "decode")
    results = results_of(tmp_path / "out", part)
    assert f"path {SCRIPT.parent.parent}:/packages/of/mine\n" in results["machine.txt"]
    assert f"bench {part} --geometry llama3-8b" in results[f"{part}.log"]
    assert re.search(r" --device cuda --minutes [345]\.\d+ ", results[f"{part}.log"])
    assert re.search(r" -p xdist.plugin -n \d+ --dist worksteal ", results[f"{PARTS[part][0]}.log"])
    limits = [int(seconds) for seconds in re.findall(r"^== \w+, (\d+) s at most: ", done.stdout, re.M)]
    # What takes no time leaves it to the next; what does not end when it is interrupted is killed after 15 s.
    assert limits
    assert max(limits) + 15 <= 360


def test_the_graphs_have_a_part_of_their_own(with_stand_ins, tmp_path):
    assert with_stand_ins().returncode == 0
    tests, graphs = (results_of(tmp_path / "out", part)[PARTS[part][0] + ".log"] for part in PARTS)
    assert "test_triton_graphs.py" in graphs
    assert "test_triton_graphs.py" not in tests
    assert "test_triton_block.py" in tests


@pytest.mark.parametrize(
    ("part", "ends", "line"),
    [
        (
            "prefill",
            {"PYTEST_SAYS": "1 failed, 4 passed in 1s", "PYTEST_ENDS": "1"},
            "1 failed, 4 passed in 1s; see tests",
        ),
        ("prefill", {"PYTEST_SAYS": "5 skipped in 0.10s"}, "5 skipped in 0.10s; see tests.log"),
        ("prefill", {"PYTEST_SAYS": "Traceback", "PYTEST_ENDS": "4"}, "pytest ended with 4; see tests.log"),
        ("prefill", {"PYTEST_ENDS": "124"}, "stopped at its time limit: 5 passed in 0.10s; see tests.log"),
        (
            "prefill",
            {"PYTEST_SAYS": "", "PYTEST_ENDS": "137"},
            "stopped at its time limit: nothing ended; see tests.log",
        ),
        ("prefill", {"BENCH_ENDS": "1"}, "ended with 1; see prefill.log"),
        ("decode", {"BENCH_ENDS": "1"}, "ended with 1; see decode.log"),
        ("decode", {"SANITIZER_ENDS": "99"}, "ERROR SUMMARY: 3 errors; see sanitizer.log"),
    ],
    ids=["fails", "all-skipped", "breaks", "stopped", "killed", "prefill-fails", "decode-fails", "sanitizer-finds"],
)
def test_a_step_that_fails_fails_the_check_and_the_others_still_run(with_stand_ins, tmp_path, part, ends, line):
    done = with_stand_ins(part, **ends)
    assert done.returncode == 1
    lines = (tmp_path / "out" / f"gpu_check_{part}.txt").read_text().splitlines()
    assert len(lines) == len(PARTS[part])
    assert [line in row for row in lines if " FAILED " in row] == [True]


@pytest.mark.parametrize(
    ("ends", "line"),
    [
        ({"BENCH_ENDS": "124"}, "decode stopped at its time limit; what was measured is in decode.json"),
        ({"SANITIZER_ENDS": "1"}, "sanitizer not run ended with 1 without a finding; see sanitizer.log"),
        ({"SANITIZER_ENDS": "0"}, "sanitizer ok ========= ERROR SUMMARY: 3 errors"),
    ],
    ids=["bench-stopped", "sanitizer-breaks", "sanitizer-passes"],
)
def test_what_is_no_failure_is_said(with_stand_ins, tmp_path, ends, line):
    assert with_stand_ins("decode", **ends).returncode == 0
    text = (tmp_path / "out" / "gpu_check_decode.txt").read_text()
    assert line in re.sub(r" +(\d+ s)?  +| +", " ", text)


def test_without_a_part_both_run_and_what_either_ends_with_counts(with_stand_ins, tmp_path):
    assert with_stand_ins(PYTEST_ENDS="1").returncode == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"gpu_check_{part}.{end}" for part in ("decode", "prefill") for end in ("tar.gz", "txt")
    ]


def test_a_machine_without_a_gpu_is_a_dry_run(with_stand_ins, tmp_path):
    done = with_stand_ins("prefill", GPU="none", BROKEN="print('launched')")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There is no GPU here: this is a dry run." in done.stdout
    assert [line[1] for line in summary_of(tmp_path / "out", "prefill")] == ["dry", "dry"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--quick",), {}, "unknown option --quick"),
        (("prefill", "a", "decode"), {}, "one OUT is enough, got a and decode"),
        (("prefill",), {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python does not run"),
        (("prefill",), {"PYTHON": "/bin/false"}, "/bin/false lacks what is needed"),
    ],
    ids=["option", "outs", "python", "packages"],
)
def test_what_does_not_fit_is_refused(tmp_path, arguments, environment, message):
    done = run(*arguments, *([] if "a" in arguments else [tmp_path]), **environment)
    assert done.returncode == 2
    assert message in done.stderr
