"""The documentation: links that lead somewhere, a table of options that is true, figures from files, code that runs."""

import dataclasses
import re
from itertools import zip_longest
from pathlib import Path

import build_docs_tables
import pytest
import torch
from tiny_models import tiny_model

import nc_patch
from nc_patch import NCConfig
from nc_patch.config import option_owners
from nc_patch.selections import base

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")})


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in PAGES])
def test_every_file_that_a_page_links_or_names_is_there(page):
    """Anchors are checked where the documentation is built."""
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / path for path in re.findall(r"\]\(([\w./-]+)[)#]", text)]
    named = [ROOT / path for path in re.findall(r"\b((?:scripts|tests|examples)/[\w/]+\.(?:py|sh|md))\b", text)]
    assert [path for path in linked + named if not path.exists()] == []


def test_the_table_of_options_has_the_names_and_defaults_of_the_config():
    page = (ROOT / "docs" / "settings.md").read_text()
    table = re.search(r"^\| option \| default \|.*?\n\n", page, re.S | re.M).group()
    listed = {}
    for row in table.strip().splitlines()[2:]:  # of which one may have several of both
        names, defaults = (re.findall(r"[\w.]+", cell) for cell in row.split("|")[1:3])
        listed |= dict(zip_longest(names, defaults))
    known = {field.name: field.default for field in dataclasses.fields(NCConfig)}
    known |= {name: getattr(kind, field) for name, owners in option_owners().items() for kind, field in owners}
    found = {name: getattr(default, "name", f"{default}".removesuffix(".0")) for name, default in known.items()}
    found |= {name: "none" for name, default in known.items() if default in (None, ())}
    assert listed == found | {"alpha": None, "C": None, "selection": "none"}


def test_tables_of_figures_are_those_of_the_results(capsys):
    assert build_docs_tables.main(["--check"]) == 0, capsys.readouterr().err


WITH_CODE = ("choosing", "decoding", "families", "selection", "settings", "start")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in WITH_CODE)])
def test_code_of_a_page_runs(page, subword_model, monkeypatch):
    """Every block of a page, one after the other, with a tiny model in the place of those that the page names."""
    monkeypatch.setattr(base, "_SELECTIONS", dict(base._SELECTIONS))  # a page may register one
    names = {name: getattr(nc_patch, name) for name in ("NCConfig", "nc_stats", "patch_model")}
    names |= {"NAME": subword_model, "model": tiny_model("llama"), "ids": torch.arange(1, 65)[None]}
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)
    assert blocks
    for block in blocks:
        for name in ('"smollm2"', '"HuggingFaceTB/SmolLM2-135M-Instruct"'):
            block = block.replace(name, "NAME")
        exec(compile(block, page, "exec"), names)
