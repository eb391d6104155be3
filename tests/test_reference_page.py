"""docs/reference.md: every public name stands on it, and every directive names something that imports."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import nc_patch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
DIRECTIVES = re.findall(r"^::: ([\w.]+)\.(\w+)$", PAGE, re.M)
MODULES = re.findall(r"^## ([\w.]+)$", PAGE, re.M)


def test_every_name_that_nc_patch_exports_stands_on_the_page():
    assert {name for module, name in DIRECTIVES if module == "nc_patch"} == set(nc_patch.__all__) - {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_class_of_a_module_stands_on_the_page(module):
    loaded = import_module(module)
    own = [name for name, each in vars(loaded).items() if getattr(each, "__module__", "") == module and name[0] != "_"]
    public = [getattr(loaded, name) for name in getattr(loaded, "__all__", own)]
    public = [each for each in public if inspect.isclass(each) or inspect.isfunction(inspect.unwrap(each))]
    shown = [getattr(import_module(place), name) for place, name in DIRECTIVES]
    assert public
    assert [each.__name__ for each in public if each not in shown] == []


def test_every_module_that_pages_and_examples_import_has_its_part_of_the_page():
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert set(re.findall(r"^from ((?:nc_patch|eval_tasks)[\w.]*) import", text, re.M)) <= set(MODULES)
