"""The wheel: what is in it, and that it works in another place than the checkout."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
from processes import python
from tiny_sweep import sweep_arguments

from nc_patch import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("nc_patch", "eval_tasks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy without what earlier builds left behind."""
    home = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results")
    shutil.copytree(ROOT, home / "source", ignore=left_out)
    python("-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(home)!r})", cwd=home / "source")
    (found,) = home.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else_but_the_version_and_the_command(wheel):
    name = f"nc_patch-{__version__}"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert "nc-patch = nc_patch.cli:main" in archive.read(f"{name}.dist-info/entry_points.txt").decode()
    assert wheel.name == f"{name}-py3-none-any.whl"
    assert re.search(rf"^## \[?{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    there = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    suffixes = {".py", ".yaml", ".html", ".txt", ".typed"}
    assert names == {path.relative_to(ROOT).as_posix() for path in there if path.suffix in suffixes}
    assert {"nc_patch/py.typed", "eval_tasks/py.typed", "eval_tasks/templates/report.html"} <= names
    assert len([name for name in names if name.startswith("eval_tasks/yaml/")]) >= 20


def test_outside_the_checkout_an_eval_runs(wheel, tmp_path):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    sizes = ("--tasks", "perplexity", "--methods", "dense", "nc-topk", "--lengths", "48", "--backend", "torch")
    script = f"""import sys, nc_patch, eval_tasks
print(nc_patch.__file__, eval_tasks.__file__)
from nc_patch.cli import main
sys.exit(main({sweep_arguments(tmp_path, tmp_path / "out", *sizes)!r}))
"""
    said = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(str(installed / package / "__init__.py") in said for package in PACKAGES)
    for name in ("results.jsonl", "summary.csv", "run.json", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0
