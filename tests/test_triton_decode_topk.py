"""What is special in Triton's decoding by codes: proofs and lists, ties, broken numbers and plans."""

import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import DESCRIBED, Shape, check
from interpreted import plan_with

from nc_patch.budget import budget_of
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import Problem
from nc_patch.ops.triton import decoding
from nc_patch.ops.triton.split import GROUP, MAX_SPLITS, MOST_ARRIVALS
from nc_patch.selections.topk import decode as triton_decode_topk
from nc_patch.selections.topk.plan import plan_for


def decode_shape(**more: object) -> Shape:
    """A query of three heads over a few tiles of keys."""
    return Shape("codes", ("codes",), **{"queries": 1, "keys": 130, "group": 3, "recent_keys": 2} | more)


def part_of(scratch: Any, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A part of the memory that the kernels of a step hand on, as it is now."""
    begin = getattr(scratch, name)
    return scratch.floats[begin : begin + math.prod(shape)].view(dtype).view(shape)


class Watched:
    """A kernel before whose launches ``change`` sees, and may change, what it reads."""

    def __init__(self, kernel, change):
        self.kernel, self.change, self.arg_names = kernel, change, kernel.arg_names

    def __getitem__(self, grid):
        def launch(**arguments):  # returns nothing that could be launched again without a look
            self.change(**arguments)
            self.kernel[grid](**arguments)

        return launch


@pytest.fixture
def scanned_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of each call had collected too few keys at first."""
    seen: list[int] = []

    def look(query, scratch, num_kv_heads, group, Lq, **_):
        rows = query.data.shape[0] * num_kv_heads * group * Lq
        seen.append(int(part_of(scratch, "reached", rows, 2, dtype=torch.int32)[:, 1].count_nonzero()))

    # Not what is remembered: kernels are known by their identity there.
    monkeypatch.setattr(decoding, "_DECODERS", {})
    monkeypatch.setattr(triton_decode_topk, "gather_kernel", Watched(triton_decode_topk.gather_kernel, look))
    return seen


@pytest.mark.parametrize(
    ("name", "way"), [("decode-ties", "codes"), ("too-few", "codes"), ("too-few", "codes with means")]
)
def test_rows_that_collect_too_few_keys_choose_among_all_of_them(name, way, device, scanned_again, monkeypatch):
    def raise_guesses(query, scratch, num_kv_heads, group, Lq, **_):
        rows = query.data.shape[0] * num_kv_heads * group * Lq
        part_of(scratch, "guess", rows)[::2] = 1e30  # of every second row, far too high

    monkeypatch.setattr(triton_decode_topk, "scan_kernel", Watched(triton_decode_topk.scan_kernel, raise_guesses))
    shape = decode_shape(queries=3, softcap=4.0, sinks=True, budget="per_head")
    case = (DESCRIBED[f"{name}-codes"][0] if name == "decode-ties" else shape).case()
    bounds = check(way, case, "triton", bounds=True).kept_mass_bounds
    assert 0 < scanned_again[0] <= case.query.shape[:3].numel() // 2 + 1
    # Every score is known exactly then, also of the rows beside them.
    assert name == "decode-ties" or (bounds[..., 1] - bounds[..., 0]).max() < 1e-3


def test_many_parts_are_joined_in_groups(device, monkeypatch):
    plan_with(monkeypatch, splits=GROUP.value + 2)
    case = decode_shape(queries=2, keys=700, group=2, head_dim=16).case()
    check("codes with means", case, "triton", bounds=True)


def test_queries_that_go_one_after_another_give_what_they_give_together(device, monkeypatch):
    shape = decode_shape(dtype=torch.bfloat16, batch=2, queries=3, keys=90, budget="per_head", intervals="padding")
    case, calls = shape.case(), []
    decode = triton_decode_topk._decode_at_once

    def counting(*args):
        calls.append(tuple(args[-1].query.shape))
        return decode(*args)

    monkeypatch.setattr(triton_decode_topk, "_decode_at_once", counting)
    together = check("codes", case, "triton", bounds=True)
    monkeypatch.setattr(triton_decode_topk, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(decoding, "_DECODERS", {})
    apart = check("codes", case, "triton", bounds=True)
    torch.testing.assert_close(apart.output, together.output, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(apart.lse, together.lse, atol=1e-6, rtol=1e-6)
    assert calls == [(2, 3, 3, 64)] + [(1, 3, 1, 64)] * 6


@pytest.mark.parametrize("name", ["decode", "decode-ragged", "decode-full-budget", "decode-forced-keys"])
def test_rows_of_ordinary_keys_collect_enough_at_first_and_their_bounds_are_narrow(name, device, scanned_again):
    case = DESCRIBED[f"{name}-codes"][0].case()
    bounds = case.run("codes", "triton", bounds=True).kept_mass_bounds
    assert (bounds[..., 1] - bounds[..., 0]).max() < 0.01
    assert scanned_again == [0]


def test_a_sample_is_not_in_step_with_a_text_that_repeats_itself(device, scanned_again):
    # 64 samples of 1,024 keys, of which every sixteenth scores high: a sample in step sees these alone, or none.
    for phase in range(0, 16, 4):
        case = decode_shape(group=1, keys=1024, sink_keys=0, recent_keys=0, budget=100, unequal=0.0).case()
        case.key *= 0.1
        case.key[:, :, phase::16] += 4 * case.query / case.query.norm()
        check("codes", case, "triton")
    assert scanned_again == [0] * 4


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_block_is_divided_among_one_wave_of_programs_with_room_for_all_its_keys(architecture):
    laws = [(2.0, 0.5), (8.0, 0.9), (1.0, 1.0)]
    heads = itertools.product((1, 2, 8), (1, 2, 8), (1, 4, 7, 8))
    lengths = itertools.product((64, 256), (1, 7, 512, 16384, 31000, 1 << 20), (1, 32))
    meta = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    for (batch, kv_heads, group), (head_dim, keys, queries) in itertools.product(heads, lengths):
        key = meta(batch, kv_heads, keys, head_dim)
        problem = Problem(meta(batch, kv_heads * group, queries, head_dim), key, key, key, key, key, 1.0)
        problem = problem._replace(means=PageMeans(key, key))
        for budget in (budget_of(keys, alpha, C) for alpha, C in laws):
            plan = plan_for(problem._replace(most=budget), keys, architecture)
            tile = plan.tile
            assert 1 <= plan.splits <= min(plan.parts - 1, MAX_SPLITS)
            assert plan.parts <= GROUP.value * (MOST_ARRIVALS.value - 1)
            assert plan.splits * plan.blocks <= 3 * 132 or plan.splits == 1
            assert keys <= plan.segment * plan.splits <= keys + 2 * tile * plan.splits
            assert plan.samples % tile == 0
