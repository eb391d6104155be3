"""The API reference: up to date, and made of docstrings that say what a caller needs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from script_modules import load_script

import nc_patch

ROOT = Path(__file__).parent.parent
PACKAGES = ("nc_patch", "eval_tasks")


reference = load_script("build_api_reference")


def _listed():
    """Every name of the reference, with its members, once."""
    found = {}
    for module in reference.MODULES:
        for entry in reference.public_names(module):
            for each in (entry, *reference.public_members(entry)):
                found[each.module, each.name] = each
    return found.values()


def _all_modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _parameters(entry):
    arguments = entry.node.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _raised(nodes) -> Iterator[ast.Raise]:
    """What a body raises itself: neither in functions inside it, nor where a handler beside it may catch it."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node
        caught = node.body if isinstance(node, ast.Try) and node.handlers else []
        yield from _raised(child for child in ast.iter_child_nodes(node) if child not in caught)


def test_the_committed_page_is_what_the_docstrings_make(capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_named_with_the_command_that_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "PAGE", tmp_path / "api.md")
    monkeypatch.setattr(reference, "page", lambda: "new\n")
    assert reference.main(["--check"]) == 1
    assert "api.md is out of date; run: python scripts/build_api_reference.py" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


def test_everything_that_nc_patch_exports_is_in_the_reference():
    names = {name for name in nc_patch.__all__ if name != "__version__"}
    assert names == {entry.name for entry in reference.public_names("nc_patch")}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    entries = [e for m in _all_modules() if m.split(".")[0] == package for e in reference.public_names(m)]
    assert len(entries) > 100
    assert [f"{entry.module}.{entry.name}" for entry in entries if not entry.docstring] == []


def test_every_name_of_the_reference_with_tensors_states_a_shape():
    takes_tensors = [
        entry
        for entry in _listed()
        if not isinstance(entry.node, ast.ClassDef)
        and any(a.annotation is not None and "Tensor" in ast.unparse(a.annotation) for a in _parameters(entry))
    ]
    assert "sparse_attention" in {entry.name for entry in takes_tensors}
    assert [entry.name for entry in takes_tensors if not re.search(r"\[(\.\.\.|[A-Z])", entry.docstring)] == []


def test_every_name_of_the_reference_that_raises_says_so():
    raising = [e for e in _listed() if not isinstance(e.node, ast.ClassDef) and any(_raised(e.node.body))]
    assert "patch_model" in {entry.name for entry in raising}
    assert [e.name for e in raising if not re.search(r"\b[Rr]aises\b", e.docstring)] == []


def test_sections_of_a_docstring_name_only_parameters_that_exist():
    wrong = []
    for entry in _listed():
        section = re.search(r"^Args:\n((?:[ ].*\n|\n)*)", entry.docstring + "\n", re.M)
        if section is None:
            continue
        named = re.findall(r"^    (\w[\w, ]*):", section.group(1), re.M)
        known = re.findall(r"\w+", reference.signature(entry))
        wrong += [(entry.name, name) for names in named for name in names.split(", ") if name not in known]
    assert wrong == []


def test_signatures_are_as_python_has_them():
    entries = {entry.name: reference.signature(entry) for entry in _listed()}
    assert entries["is_patched"] == "is_patched(model: torch.nn.Module) -> bool"
    assert entries["unpatch_model"] == "unpatch_model(model: Model) -> Model"
    assert entries["patched"].startswith("@contextmanager\npatched(\n    model: Model,\n    alpha: Any = None,")
    assert "    *,\n    prefill: Selection = DEFAULT_PREFILL," in entries["NCConfig"]
    assert entries["NCConfig.to_json"] == "NCConfig.to_json() -> str"
    assert entries["UnsupportedModelError"] == "class UnsupportedModelError(ValueError)"
