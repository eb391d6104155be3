"""``nc-patch bench``: its prompts, what is compared, and its rivals, held to plain attention on the CPU."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench import checks, rivals
from eval_tasks.bench.inputs import GEOMETRIES, Geometry, make_inputs
from nc_patch.cli import main
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention

TINY = Geometry(4, 2, 16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)


def drawn(length=200, batch=1, queries=None, seed=0, geometry=TINY):
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(geometry, batch, length, queries or length, torch.float32, generator)


def dense(inputs):
    return scaled_dot_product_attention(
        *(inputs.query, inputs.key, inputs.value), is_causal=inputs.query.shape[2] > 1, enable_gqa=True
    )


@pytest.mark.parametrize("queries", [200, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("selection", ["block", "topk", "window", "dense"])
def test_both_ways_to_what_is_right_agree(selection, queries, monkeypatch):
    options = {"min_mass": 0.8, "tail": "drop", "dense_below": 0}
    inputs, config = drawn(queries=queries), NCConfig(2.0, 0.6, selection=selection, **options)
    rows, phase = checks.checked_rows(queries, 64), "prefill" if queries > 1 else "decode"
    reference = checks.expected_output(inputs, config, phase, rows)
    monkeypatch.setattr(checks, "REFERENCE_SCORES", 0)
    other = checks.expected_output(inputs, config, phase, rows)
    assert other.against != reference.against
    assert (other.output - reference.output).norm() < 1e-5 * reference.output.norm()
    assert other.attended == pytest.approx(reference.attended)
    assert other.kept_mass == pytest.approx(reference.kept_mass, rel=1e-5)
    if selection == "dense":
        assert checks.compare(dense(inputs), reference, selection)["right"]
        assert not checks.compare(1.01 * dense(inputs), reference, selection)["right"]
    elif phase == "prefill":
        whole = sparse_attention(inputs.query, inputs.key, inputs.value, alpha=2.0, C=0.6, selection=selection,
                                 **options)  # fmt: skip
        assert checks.compare(whole, reference, selection)["right"]


def test_a_value_that_is_not_finite_in_a_row_that_is_not_compared_is_wrong():
    inputs, config = drawn(), NCConfig(2.0, 0.6, selection="dense")
    right = checks.expected_output(inputs, config, "prefill", torch.arange(64))
    output = dense(inputs)
    assert checks.compare(output, right, "dense")["right"]
    output[:, :, 150] = torch.nan
    assert not checks.compare(output, right, "dense")["right"]


def test_checked_rows_are_whole_query_blocks_with_the_first_and_the_last():
    assert checks.checked_rows(50, 64).tolist() == list(range(50))
    rows = checks.checked_rows(1000, 64)
    assert len(rows) == len(rows.unique()) == 3 * 64 + 1000 - 960
    assert rows[:64].tolist() == list(range(64))
    assert rows[-1] == 999


def test_options_reach_the_attention(tmp_path):
    def block(out, *further):
        arguments = ["--device", "cpu", "--geometry", "tiny", "--lengths", "300", "--repeats", "1", "--alpha", "1"]
        known = ["--selections", "block", "--out", str(tmp_path / out)]
        assert main(["bench", "prefill", *arguments, *known, *further]) == 0
        record = json.loads((tmp_path / out / "prefill.json").read_text())
        return record["rows"][0], record["settings"]["options"][0]

    plain, _ = block("plain", "--set", "dense_below=0")
    more = (
        "min_mass=0.99",
        "max_factor=8",
        "block_size=32",
        "query_block_size=128",
        "sample_stride=1",
        "local_keys=32",
    )
    enlarged, options = block("more", "--set", "dense_below=0", *more)
    assert enlarged["kept_mass"] > plain["kept_mass"]
    assert enlarged["attended"] > plain["attended"]
    names = ("size", "query_block_size", "sample_stride", "local_keys")
    assert [options[name] for name in names] == [32, 128, 1, 32]
    assert block("dense", "--set", "dense_below=300")[0]["kept_mass"] == pytest.approx(1)


def test_prompts_are_local_have_sinks_and_seek_few_of_the_other_keys():
    n, budget = 4096, round(4 * 4096**0.6)
    inputs = drawn(n, geometry=Geometry(6, 2, 64))
    query, key = inputs.query[0, :, 2048:].float(), inputs.key[0].float().repeat_interleave(3, 0)
    scores = (query @ key.transpose(1, 2)) * 64**-0.5
    scores.masked_fill_(torch.arange(n) > torch.arange(2048, n)[:, None], -torch.inf)
    softmax = torch.softmax(scores, -1)
    last = softmax[:, ::64]
    assert 0.88 < last.topk(budget, -1).values.sum(-1).mean() < 0.99
    assert 0.15 < last[..., :4].sum(-1).mean() < 0.6
    own = torch.stack([softmax[:, i, i + 2048 - 64 : i + 2048 + 1].sum(-1) for i in range(0, 2048, 64)]).mean()
    assert 0.03 < own < 0.4
    # Queries of one run seek what others of the run seek: their softmaxes overlap more than those of far rows do.
    kept = softmax[:, :, 64:1900]
    near, far = ((kept[:, 1000] * kept[:, other]).sum(-1).mean() for other in (1001, 1700))
    assert near > far


@pytest.mark.parametrize(("phase", "form"), [("prefill", "expanded"), ("decode", "rows")])
def test_the_rivals_here_are_right_and_the_others_say_why_they_are_not(phase, form):
    inputs, absent = drawn(queries=None if phase == "prefill" else 1, batch=2), set()
    for name, make in rivals.rivals(phase).items():
        try:
            assert torch.allclose(make([inputs])(0), dense(inputs), atol=1e-5)
        except rivals.Absent as error:
            absent.add(f"{name}: {error}")
    assert absent == {
        f"sdpa {b}, {f}: the {b} backend needs a GPU" for b in ("cudnn", "efficient") for f in ("gqa", form)
    }


def test_plain_attention_is_not_tried_on_long_prompts(monkeypatch):
    monkeypatch.setattr(rivals, "_MATH_KEYS", 100)
    with pytest.raises(rivals.Absent, match="tried up to 100 keys"):
        rivals.rivals("prefill")["sdpa math, gqa"]([drawn()])
