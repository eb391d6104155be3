"""The API reference: up to date, and made of docstrings that say what a caller needs."""

import ast
import inspect
import re
import textwrap

import pytest
from script_modules import load_script

import nc_patch

reference = load_script("build_api_reference")
# Every name of the reference with its members, once each.
LISTED = {
    name: reference._function(what)
    for module in reference.MODULES
    for entry in reference.public_names(module)
    for name, what in (entry, *reference.public_members(*entry))
}
FUNCTIONS = {name: inspect.unwrap(what) for name, what in LISTED.items() if not inspect.isclass(what)}


def raises(body):
    """Whether a body raises by itself: neither in a function inside it, nor where a handler beside it may catch it."""
    for node in body:
        caught = node.body if isinstance(node, ast.Try) and node.handlers else []
        inside = [child for child in ast.iter_child_nodes(node) if child not in caught]
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) and raises(inside):
            return True
    return False


def test_the_committed_page_is_what_the_docstrings_make(capsys, monkeypatch, tmp_path):
    assert reference.main(["--check"]) == 0, capsys.readouterr().err
    monkeypatch.setattr(reference, "PAGE", tmp_path / "api.md")
    assert reference.main([]) == 0
    (tmp_path / "api.md").write_text("old")
    assert reference.main(["--check"]) == 1


def test_everything_that_nc_patch_exports_is_in_the_reference_with_its_signature():
    assert {name for name, _ in reference.public_names("nc_patch")} == set(nc_patch.__all__) - {"__version__"}
    assert reference.signature("unpatch_model", nc_patch.unpatch_model) == "unpatch_model(model: Model) -> Model"
    assert "\n    *,\n    prefill: Selection = Block(" in reference.signature("NCConfig", nc_patch.NCConfig)


@pytest.mark.parametrize("name", LISTED)
def test_a_docstring_says_what_a_caller_needs(name):
    what, said = LISTED[name], inspect.getdoc(LISTED[name]) or ""
    assert said
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", said + "\n", re.M)
    named = re.findall(r"^    (\w[\w, ]*):", section[1] if section else "", re.M)
    known = re.findall(r"\w+", reference.signature(name, what))
    assert [each for names in named for each in names.split(", ") if each not in known] == []
    if name in FUNCTIONS:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[name]))).body
        tensors = [each for each in node.args.args + node.args.kwonlyargs if "Tensor" in ast.dump(each)]
        assert not tensors or re.search(r"\[(\.\.\.|[A-Z])", said), "a tensor's shape is missing"
        assert not raises(node.body) or re.search(r"\b[Rr]aises\b", said), "what it raises is missing"
