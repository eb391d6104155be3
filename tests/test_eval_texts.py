"""Texts by name."""

import hashlib

import pytest

from eval_tasks.errors import EvalError
from eval_tasks.texts import load_text, reflow


def test_the_python_reference_is_the_same_every_time_and_its_lines_are_whole():
    text = load_text("python-reference")
    assert text == load_text("python-reference")
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert "language reference of Python" in text.origin
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in text.content
    assert len(text.content) > 300_000


def test_reflow_joins_wrapped_prose_and_leaves_code_lists_and_paragraphs_alone():
    wrapped = "\n".join(
        [
            "The extended form of the statement is equivalent to another, longer,",
            "one that follows here, which was hyphen-broken by the wrapping of the",
            "documentation.",
            "",
            "   if __debug__:",
            "       if not expression: raise AssertionError",
            "",
            "* a list item that is so long that it had to be wrapped by the writer",
            "  of the page",
            "* another item",
        ]
    )
    assert reflow(wrapped).split("\n") == [
        "The extended form of the statement is equivalent to another, longer, one that follows here, which was "
        "hyphen-broken by the wrapping of the documentation.",
        "",
        "   if __debug__:",
        "       if not expression: raise AssertionError",
        "",
        "* a list item that is so long that it had to be wrapped by the writer of the page",
        "* another item",
    ]


def test_reflow_joins_words_that_were_broken_at_their_hyphen_without_a_blank():
    assert reflow("x" * 60 + " quote-\ndelimited words") == "x" * 60 + " quote-delimited words"


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("Call me\nIshmael. é\n", encoding="utf-8")
    text = load_text(str(path))
    assert text.content == "Call me\nIshmael. é\n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_data_set_of_local_text_files_needs_no_network(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "novel.txt"
    path.write_text("One line.\nAnother line.\n", encoding="utf-8")
    assert load_text(f"text,{path}:train").content == "One line.\nAnother line."


def test_a_data_set_joins_documents_of_the_named_column(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "books.jsonl"
    path.write_text('{"body": "first"}\n{"body": "second"}\n', encoding="utf-8")
    assert load_text(f"json,{path}:train:body").content == "first\n\nsecond"
    with pytest.raises(EvalError, match="no column 'text'; it has body"):
        load_text(f"json,{path}:train")


def test_missing_empty_and_unreadable_texts_are_refused(tmp_path):
    with pytest.raises(EvalError, match="no text named 'no-such-text'"):
        load_text("no-such-text")
    with pytest.raises(EvalError, match="does not exist"):
        load_text(f"text,{tmp_path}/nothing.txt:train")
    with pytest.raises(EvalError, match=r"written NAME.*for example emozilla/pg19-test:test"):
        load_text("pg19:")
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(EvalError, match="is empty"):
        load_text(str(empty))
    with pytest.raises(EvalError, match="not UTF-8"):
        load_text(str(latin))
