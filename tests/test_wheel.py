"""The wheel: what is in it, and that it works in another place than the checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_sweep import sweep_arguments

from nc_patch import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("nc_patch", "eval_tasks")
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def python(*command, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False} | options
    done = subprocess.run([sys.executable, *map(str, command)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments):
    return python("-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy without what earlier builds left behind."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    home = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results")
    shutil.copytree(ROOT, home / "source", ignore=left_out)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", home, home / "source")
    (found,) = home.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run_outside(installed, cwd, script):
    """What a script says that runs in ``cwd`` with the installed packages before those of the environment."""
    return python(script, cwd=cwd, env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"})


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert "EvalError" in archive.read("eval_tasks/errors.py").decode()
    suffixes = {".py", ".yaml", ".html", ".txt", ".typed"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in suffixes
    }
    assert names == wanted
    assert {"nc_patch/py.typed", "eval_tasks/py.typed", "eval_tasks/templates/report.html"} <= names
    assert "eval_tasks/nc_perplexity.yaml" in names
    assert len([name for name in names if name.startswith("eval_tasks/yaml/")]) >= 20
    assert "eval_tasks/metrics/string_match/string_match.py" in names


def test_the_one_version_the_licence_and_the_command_are_stated(wheel):
    name = f"nc_patch-{__version__}"
    assert wheel.name == f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
        assert "nc-patch = nc_patch.cli:main" in archive.read(f"{name}.dist-info/entry_points.txt").decode()
        assert f"{name}.dist-info/licenses/LICENSE" in archive.namelist()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    places = [path for path in (ROOT / "nc_patch").rglob("*.py") if f'"{__version__}"' in path.read_text()]
    assert places == [ROOT / "nc_patch" / "version.py"]
    assert re.search(rf"^## \[?{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_outside_the_checkout_the_lines_of_the_readme_and_an_eval_run(installed, tmp_path):
    arguments = sweep_arguments(tmp_path, tmp_path / "out", "--tasks", "perplexity", "--backend", "torch")
    lines = re.search(r"```python\n(from transformers.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert lines is not None
    assert HUB_NAME in lines.group(1)
    script = tmp_path / "readme.py"
    script.write_text(
        # In PyTorch: compiling kernels for another place takes a minute.
        lines.group(1).replace(HUB_NAME, str(tmp_path / "model")).replace("C=0.5)", "C=0.5, backend='torch')")
        + "import sys, torch, nc_patch, eval_tasks\n"
        + "model(torch.arange(40)[None])\n"
        + "assert 0 < nc_stats(model)['attended_fraction'] < 1\n"
        + "print(nc_patch.__file__, eval_tasks.__file__)\n"
        + "from nc_patch.cli import main\n"
        + f"sys.exit(main({arguments!r}))\n"
    )
    said = run_outside(installed, tmp_path, script)
    for package in PACKAGES:
        assert str(installed / package / "__init__.py") in said
    assert "Report:" in said
    for name in ("results.jsonl", "summary.csv", "run.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.wide
def test_outside_the_checkout_tasks_and_metrics_are_found_and_the_command_is_there(installed, tmp_path):
    pytest.importorskip("lm_eval")
    script = tmp_path / "tasks.py"
    script.write_text(
        "from pathlib import Path\n"
        "import eval_tasks, evaluate\n"
        "from lm_eval.tasks import TaskManager\n"
        "from eval_tasks.metrics import METRICS, metric_path\n"
        "found = TaskManager(include_path=str(Path(eval_tasks.__file__).parent), include_defaults=False).all_tasks\n"
        "print(sorted(found))\n"
        "print([evaluate.load(str(metric_path(name))).name for name in METRICS])\n"
    )
    said = run_outside(installed, tmp_path, script)
    assert "'nc_perplexity'" in said
    assert "'nc_niah_single_2'" in said
    assert "string_match" in said
    command = (installed / "bin" / "nc-patch").read_text()
    assert "from nc_patch.cli import main" in command
