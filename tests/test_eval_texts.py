"""Texts by name, what the tasks hand to a model, and where the samples lie in the text."""

import hashlib
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from tiny_sweep import tiny_text, tiny_tokenizer

from eval_tasks.errors import EvalError
from eval_tasks.tasks import TASKS, Layout, check_lengths, passage_start, places, tokenise
from eval_tasks.texts import load_text, reflow

LAYOUT = Layout(lengths=(64, 100, 257), samples=3, scored=20, passage=24, seed=5)
# With the breaks left out that the writer put in to wrap lines.
WRITTEN = """\
The extended form of the statement is equivalent to another, longer,{}\
one that follows here, in which a hyphen breaks a word, such as quote-{}\
delimited words.

   if __debug__:
       if not expression: raise AssertionError

* a list item that is so long that it had to be wrapped by the writer{}\
of the page
* another item"""


def test_the_python_reference_is_the_same_every_time_and_its_lines_are_whole():
    text = load_text("python-reference")
    assert text == load_text("python-reference")
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in text.content
    assert len(text.content) > 300_000
    assert reflow(WRITTEN.format("\n", "\n", "\n  ")) == WRITTEN.format(" ", "", " ")


def test_files_and_data_sets_of_local_files_are_read_as_they_are(tmp_path):
    novel, books = tmp_path / "novel.txt", tmp_path / "books.jsonl"
    novel.write_text("Call me\nIshmael. é\n", encoding="utf-8")
    books.write_text('{"body": "first"}\n{"body": "second"}\n', encoding="utf-8")
    assert load_text(str(novel)).content == "Call me\nIshmael. é\n"
    assert load_text(f"json,{books}:train:body").content == "first\n\nsecond"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no-such-text", None, "no text named 'no-such-text'"),
        ("{}/file", b" \n", "is empty"),
        ("{}/file", "é".encode("latin-1"), "not UTF-8"),
        ("json,{}/file.json:train", b'{"body": "first"}\n', "no column 'text'; it has body"),
    ],
)
def test_missing_empty_and_unreadable_texts_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
        (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(EvalError, match=message):
        load_text(name.format(tmp_path))


@pytest.fixture(params=[False, True], ids=["no-bos", "bos"])
def text(request):
    return tokenise(tiny_tokenizer(bos=request.param), tiny_text(3000))


def read(text, task, length, index=0):
    """The tokens of a sample, without those that the tokenizer puts before: what is read, and the last scored one."""
    ids = TASKS[task].build(text, places(text, LAYOUT)[index], length, LAYOUT).ids
    assert len(ids) == length + 1
    assert tuple(ids[: len(text.prefix)]) == text.prefix
    return ids[len(text.prefix) :]


def test_recall_holds_the_same_passage_near_the_start_and_at_the_end_and_the_text_around_it(text):
    place = passage_start(text, places(text, LAYOUT)[1], LAYOUT)
    passage, first = text.ids[place : place + LAYOUT.passage], place - LAYOUT.lead
    for length in LAYOUT.lengths:
        ids = read(text, "recall", length, 1)
        np.testing.assert_array_equal(ids[-LAYOUT.passage :], passage)
        np.testing.assert_array_equal(ids[: -LAYOUT.passage], text.ids[first : first + len(ids) - LAYOUT.passage])
        unseen = read(text, "unseen", length, 1)
        np.testing.assert_array_equal(unseen[-LAYOUT.passage :], passage)
        earlier = np.lib.stride_tricks.sliding_window_view(unseen[: -LAYOUT.passage], LAYOUT.passage)
        assert not (earlier == passage).all(axis=1).any()


def test_perplexity_scores_the_same_tokens_under_contexts_that_grow_to_the_left(text):
    short, middle, long = (read(text, "perplexity", length) for length in LAYOUT.lengths)
    np.testing.assert_array_equal(middle[-len(short) :], short)
    np.testing.assert_array_equal(long[-len(middle) :], middle)


@pytest.mark.parametrize("words_before", [LAYOUT.lead, 40, LAYOUT.lead + LAYOUT.slack])
def test_the_passage_is_prose_wherever_it_lies_and_a_last_stretch_is_long_enough(words_before):
    stretch = [*["12"] * words_before, *["abcdefgh"] * LAYOUT.passage, *["a4"] * LAYOUT.stretch][: LAYOUT.stretch]
    text = tokenise(tiny_tokenizer(), " ".join(["abcdefghij"] * 30 + stretch))
    assert passage_start(text, 30, LAYOUT) == 30 + words_before
    for task, length in product(TASKS, LAYOUT.lengths):
        assert len(TASKS[task].build(text, 30, length, LAYOUT).ids) == length + 1


def test_bytes_count_utf8_and_not_characters():
    text = tokenise(tiny_tokenizer(), "w03 é€😀 w04")
    assert list(text.byte_ends) == [3, 3 + 1 + 2 + 3 + 4, 3 + 1 + 2 + 3 + 4 + 4]


def test_places_do_not_overlap_and_fewer_are_the_first_of_more(text):
    starts = places(text, LAYOUT)
    ordered = sorted(starts)
    assert all(b - a >= LAYOUT.stretch for a, b in pairwise(ordered))
    assert ordered[-1] + LAYOUT.stretch <= len(text.ids)
    assert places(text, replace(LAYOUT, samples=2)) == starts[:2]
    assert places(text, replace(LAYOUT, seed=6)) != starts


@pytest.mark.parametrize(("task", "least"), [("perplexity", 20), ("recall", 54), ("unseen", 25)])
def test_lengths_below_what_a_task_needs_are_refused_and_that_length_works(text, task, least):
    least += len(text.prefix)
    fits, short = (Layout((length,), 1, LAYOUT.scored, LAYOUT.passage, 0) for length in (least, least - 1))
    check_lengths([TASKS[task]], fits, len(text.prefix))
    assert len(TASKS[task].build(text, 0, least, fits).ids) == least + 1
    with pytest.raises(EvalError, match=f"length {least - 1} is too short for the task {task}, which needs {least}"):
        check_lengths([TASKS[task]], short, len(text.prefix))
