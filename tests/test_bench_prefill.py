"""``nc-patch bench``: its prompts, what is compared, and its rivals, held to plain attention on the CPU."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench import checks, rivals
from eval_tasks.bench.inputs import GEOMETRIES, Geometry, make_inputs
from nc_patch.cli import main
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Geometry(4, 2, 16, 64, 96)


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
        known = ["--selections", "block", "--dense", "sdpa", "--out", str(tmp_path / out)]
        assert main(["bench", "prefill", *arguments, *known, *further]) == 0
        record = json.loads((tmp_path / out / "prefill.json").read_text())
        return record["rows"][0], record["settings"]["options"][0]

    plain, _ = block("plain", "--dense-below", "0")
    more = ("--dense-below", "0", "--min-mass", "0.99", "--max-factor", "8", "--block-size", "32")
    enlarged, options = block("more", *more, "--query-block-size", "128", "--sample-stride", "1", "--local-keys", "32")
    assert enlarged["kept_mass"] > plain["kept_mass"]
    assert enlarged["attended"] > plain["attended"]
    names = ("size", "query_block_size", "sample_stride", "local_keys")
    assert [options[name] for name in names] == [32, 128, 1, 32]
    assert block("dense", "--dense-below", "300")[0]["kept_mass"] == pytest.approx(1)


def test_prompts_are_local_have_sinks_and_seek_few_of_the_other_keys():
    n, budget = 4096, round(4 * 4096**0.6)
    inputs = drawn(n, geometry=Geometry(6, 2, 64, 0, 0))
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


@pytest.mark.parametrize("length", [64, 300, 512])
def test_the_mask_of_flex_attention_is_causal(length):
    inputs = drawn(length)
    mask = rivals.causal_blocks(length, CPU)
    output = flex_attention(inputs.query, inputs.key, inputs.value, block_mask=mask, enable_gqa=True)
    assert torch.allclose(output, dense(inputs), atol=1e-5)


@pytest.mark.parametrize(("phase", "form"), [("prefill", "expanded"), ("decode", "rows")])
def test_the_rivals_here_are_right_and_the_others_say_why_they_are_not(phase, form):
    inputs, absent = drawn(queries=None if phase == "prefill" else 1, batch=2), set()
    for name, make in rivals.rivals(CPU, phase).items():
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
        rivals.rivals(CPU, "prefill")["sdpa math, gqa"]([drawn()])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn 3", "flashinfer"])
def test_rivals_of_other_packages_are_called_with_their_layouts_and_absent_by_name(name, phase, monkeypatch):
    """Stand-ins with the packages' documented layouts; whether the packages agree only a GPU can tell."""

    def attend(query, key, value, causal=False):
        query, key, value = (t.transpose(1, 2).float() for t in (query, key, value))
        output = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (output, None) if name == "flash_attn 3" else output

    class Paged:
        def __init__(self, workspace, layout, **options):
            assert layout == "HND"

        def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page_size, **options):
            self.pages = [indices[indptr[b] : indptr[b + 1]].long() for b in range(len(last))]
            assert last.tolist() == [page_size] * len(last)

        def run(self, query, pages):
            flat = [torch.stack([t[p].transpose(1, 2).flatten(0, 1) for p in self.pages]) for t in pages]
            return attend(query[:, None], *flat)[:, 0]

    class Ragged:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(self, queries, keys, heads, kv_heads, head_dim, *, causal, **dtypes):
            assert (heads, kv_heads, head_dim, causal) == (4, 2, 16, True)
            assert torch.equal(queries, keys)
            self.ends = queries.tolist()

        def run(self, *tensors):
            assert all(tensor.is_contiguous() for tensor in tensors)
            ranges = [slice(begin, end) for begin, end in zip(self.ends[:-1], self.ends[1:], strict=True)]
            return torch.cat([attend(*(tensor[None, rows] for tensor in tensors), causal=True)[0] for rows in ranges])

    sets = [drawn(128, 2, 1 if phase == "decode" else None, seed) for seed in (0, 1)]
    make = rivals.rivals(CUDA, phase)[name]
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda module: None)
        with pytest.raises(rivals.Absent, match="is not installed"):
            make(sets)
    package = {"flash_attn_func": attend, "flash_attn_with_kvcache": attend, "__spec__": object()}
    package |= {"BatchDecodeWithPagedKVCacheWrapper": Paged, "BatchPrefillWithRaggedKVCacheWrapper": Ragged}
    for module in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**package))
    step = make(sets)
    for i in (0, 1):
        assert torch.allclose(step(i), dense(sets[i]), atol=1e-5)
