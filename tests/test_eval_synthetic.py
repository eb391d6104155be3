"""The generated tasks: lengths, answers, determinism, evidence, and errors, for three kinds of tokenizer."""

import copy
import re
import shutil
from collections import Counter
from unittest.mock import Mock

import evaluate
import pytest
from tiny_sweep import CHAT_TEMPLATE, KINDS, tokenizer_of_kind

from eval_tasks.errors import EvalError
from eval_tasks.metrics import string_match
from eval_tasks.synthetic import GENERATORS, chat, synthesize
from eval_tasks.synthetic.haystack import NOISE
from eval_tasks.synthetic.sample import DEPTHS

NEEDLES = tuple(name for name in GENERATORS if name.startswith("niah_"))


def sample(name, length=2048, seed=0, index=0, kind="byte_bpe", **options):
    tokenizer = tokenizer_of_kind(kind)
    if kind == "unigram_chat":
        options["render"] = chat(tokenizer)
    return synthesize(GENERATORS[name], tokenizer, length, seed, index, **options)


@pytest.mark.parametrize(
    ("kind", "length"), [*((kind, length) for kind in KINDS for length in (512, 2048)), (KINDS[0], 16384)]
)
@pytest.mark.parametrize("name", GENERATORS)
def test_a_sample_fills_its_length_to_two_percent_and_never_over(name, kind, length):
    found = sample(name, length, index=1, kind=kind)
    tokens = tokenizer_of_kind(kind)(found.prompt, add_special_tokens=not found.prompt.startswith("<s>"))["input_ids"]
    assert len(tokens) == found.prompt_tokens
    assert 0.98 * length <= found.prompt_tokens + found.new_tokens <= length
    assert found.new_tokens == GENERATORS[name].new_tokens


@pytest.mark.parametrize("name", GENERATORS)
def test_samples_depend_on_seed_and_index_alone(name):
    first = sample(name, 1024, seed=3, index=5)
    assert sample(name, 1024, seed=3, index=5) == first
    assert sample(name, 1024, seed=4, index=5).prompt != first.prompt
    assert sample(name, 1024, seed=3, index=6).prompt != first.prompt
    assert sample(name, 2048, seed=3, index=5).answers == first.answers == GENERATORS[name].answers(3, 5)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", NEEDLES)
def test_every_needle_is_there_once_and_holds_its_answer(name, index):
    found = sample(name, index=index)
    assert len(found.answers) == len(set(found.answers)) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", found.prompt)
    asked = {value: key for key, value in needles if value in found.answers}
    assert set(asked) == set(found.answers)
    for answer, key in asked.items():
        assert found.prompt.count(answer) == 1
        assert key in found.question[found.question.rindex("\n") :]
        assert key in found.prefix
    assert len({key for key, _ in needles}) == (1 if name == "niah_multivalue" else len(needles))
    expected = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    assert len(needles) == expected or (name in ("niah_multikey_2", "niah_multikey_3") and len(needles) > 10)


def test_a_long_sample_hides_its_passkey_twice_in_nothing_else_than_noise():
    found = sample("passkey", 131072)
    (key,) = found.answers
    rest = found.question.split("\n")[1].replace(f"The pass key is {key}. Remember it. {key} is the pass key.", "")
    for sentence in NOISE:
        rest = rest.replace(sentence, "")
    assert (rest.strip(), found.prompt.count(key), len(key)) == ("", 2, 5)


def test_needles_lie_at_every_depth_of_the_grid_once():
    depths = sorted(sample("passkey", 4096, index=i).depths[0] for i in range(DEPTHS))
    assert depths == pytest.approx([i / (DEPTHS - 1) for i in range(DEPTHS)], abs=0.05)


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_variables_form_a_chain_that_ends_in_the_value(length):
    found = sample("vt", length, index=2)
    last_question = found.prompt[found.prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+)", last_question)[1]
    assigned = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", last_question))
    assert list(assigned) == list(found.answers)
    assert list(assigned.values()) == [value, *found.answers[:-1]]


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_the_words_that_are_asked_for_are_the_most_common(length):
    found = sample("cwe", length, index=1)
    items = re.findall(r"(\d+)\. (\w+)", found.question[found.question.rindex("Below is a numbered list") :])
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    ranked = Counter(word for _, word in items).most_common()
    assert {word for word, _ in ranked[:10]} == set(found.answers)
    assert ranked[9][1] > ranked[10][1]
    found = sample("fwe", length, index=1)
    ranked = Counter(found.question.split("coded words. ")[1].split("\nQuestion:")[0].split()).most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *found.answers]
    assert ranked[3][1] > ranked[4][1]


USER_TURNS = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('user turns only') }}{% endif %}"


@pytest.mark.parametrize(
    "start", ["", USER_TURNS, "{% set messages = messages[:1] %}"], ids=["opens", "raises", "drops"]
)
def test_a_chat_template_wraps_the_question_and_opens_the_answer(start):
    tokenizer, plain = copy.deepcopy(tokenizer_of_kind("unigram_chat")), sample("niah_single_2", 1024)
    tokenizer.chat_template = start + CHAT_TEMPLATE
    found = synthesize(GENERATORS["niah_single_2"], tokenizer, 1024, render=chat(tokenizer))
    assert found.prompt == f"<s>[user] {found.question}</s>[assistant] {found.prefix}"
    assert (found.answers, found.prefix) == (plain.answers, plain.prefix)


def test_a_length_without_room_is_refused():
    with pytest.raises(EvalError, match="niah_single_2 cannot fill 160 tokens, of which 128 are kept for the answer"):
        sample("niah_single_2", 160)


def test_another_text_hides_the_facts_unless_it_says_them(tmp_path):
    words = "It was a quiet evening and nobody in the old house had anything to say about the strange letter"
    story = "\n\n".join(f"{words} of day {i}.  More   was to come." for i in range(60))
    (tmp_path / "novel").write_text(story)
    prompt = sample("niah_single_2", 1024, text=str(tmp_path / "novel")).prompt
    assert "It was a quiet evening" in prompt
    assert "   " not in prompt
    (needle,) = re.findall(r"One of the special magic .*?: \d+\.", prompt)
    told = f"{story}\n\nNobody there knew what the next sentence of this letter was to tell them. {needle}"
    (tmp_path / "told").write_text(told)
    with pytest.raises(EvalError, match=r"stands \d times in the prompt, .*give another text"):
        sample("niah_single_2", 4096, text=str(tmp_path / "told"))


@pytest.mark.parametrize("is_alone", [False, True], ids=["directory", "file alone"])
def test_string_match_is_rulers_needs_no_network_and_refuses_what_it_cannot_score(is_alone, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=AssertionError("the network was asked")))
    place = string_match.__path__[0]
    place = shutil.copy(f"{place}/string_match.py", tmp_path) if is_alone else place
    metric = evaluate.load(place, keep_in_memory=True)
    for said, wanted, share, part in (
        ("The numbers are 12, 34 and 56.", ["12", "34", "56"], 1.0, 1.0),
        ("only 34", ["12", "34", "56", "78"], 0.25, 1.0),
        ("", ["12"], 0.0, 0.0),
        ("  ECHO-Lamp\x07", ["echo-lamp"], 1.0, 1.0),
        ("12\x0034", ["1234"], 0.0, 0.0),
    ):
        for match, expected in (("all", share), ("part", part)):
            found = metric.compute(predictions=[said, "x"], references=[wanted, ["x"]], match=match)
            assert found == {"string_match": (expected + 1) / 2, "scores": [expected, 1.0]}
    for wanted, match, message in (("a", "any", "match must be 'all'"), ("", "all", "at least one string")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=["a"], references=[list(wanted)], match=match)
