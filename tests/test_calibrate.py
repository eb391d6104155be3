"""Calibration: rows of attention against float64, whole models that stay as they were, and laws that are found."""

import hashlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from attention_cases import random_case
from operations import problem_of
from tiny_models import FAMILIES, eager_weights, random_ids, tiny_model
from tiny_sweep import tiny_text, tiny_tokenizer
from ways import state_of

from nc_patch import ProfileError, calibrate, nc_stats, patch_model
from nc_patch.calibration import measure
from nc_patch.calibration.calibrate import cut_pieces
from nc_patch.calibration.fit import fit_power_laws, theil_sen
from nc_patch.calibration.measure import Plan, measure_piece, row_curves
from nc_patch.layers import Observed
from nc_patch.ops import rows as score_rows
from nc_patch.ops.problem import visible_mask
from nc_patch.patch import observed
from nc_patch.selections import TopK

LENGTHS = (32, 64, 128)
IDS = list(range(1, 97)) * 4

# Rows of attention


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 12, 17, 26, 33])
def test_rows_equal_the_float64_definition(monkeypatch, seed):
    monkeypatch.setattr(score_rows, "MOST_ROWS", 16)  # so that they are taken in several blocks
    case = random_case(seed)
    query, key, value, visible = (tensor[:1] for tensor in (case.query, case.key, case.value, case.visible))
    full = visible[..., 1] - visible[..., 0]
    rows = full[0].nonzero()[:, 0]
    scoring = {"scale": case.scale, "softcap": case.softcap or None, "sinks": case.sinks}
    keys, eps = (measure.SMALLEST_KEYS, 11, 16, 23, 64, 200), (0.05, 0.3)
    g = torch.Generator().manual_seed(seed)
    probes = torch.randn(2, query.shape[1], len(rows), value.shape[-1], generator=g)
    problem_with = lambda budget: problem_of(query, key, value, visible, budget, **scoring)  # noqa: E731
    call = Observed(0, problem_with(full[:, None]), torch.zeros(*query.shape[:3], value.shape[-1]))
    found = row_curves(call, rows, keys, eps, probes)
    assert torch.equal(found.visible, full[0, rows].long())

    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = torch.softmax(scores.masked_fill(~visible_mask(visible, key.shape[2]), -torch.inf), -1)[0][:, rows]
    mass = weights.sort(-1, descending=True).values.cumsum(-1)
    for number, share in enumerate(eps):
        # Within rounding of the threshold either count is right.
        fewest, most = ((mass < 1 - share + slack).sum(-1) + 1 for slack in (-1e-5, 1e-5))
        assert ((found.support[number] >= fewest) & (found.support[number] <= most)).all()
    reference = lambda budget: TopK(tail="drop").reference(problem_with(budget))  # noqa: E731
    dense = reference(full[:, None])
    for number, count in enumerate(keys):
        expected = reference(full.clamp(max=count)[:, None])
        assert torch.allclose(found.kept[number].double(), expected.kept_mass[0][:, rows], atol=2e-5)
        difference = (expected.output - dense.output)[0][:, rows].double()
        along = (probes.double() * difference).sum(-1).square().sum(0)
        assert torch.allclose(found.error[number].double(), along, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_eager_attention(family):
    model, ids = tiny_model(family, num_hidden_layers=2), random_ids(128)
    plan = Plan(LENGTHS, 6, (0.05, 0.2))
    piece = measure_piece(model, ids.tolist(), plan)
    attentions = eager_weights(model, ids[None])
    for level, length in enumerate(LENGTHS):
        rows = plan.positions(length)
        for layer, attention in enumerate(attentions):
            weights = attention[0][:, rows]
            weights = weights / weights.sum(-1, keepdim=True)  # a learned sink takes its part
            assert piece.visible[level, layer].tolist() == (weights[0] > 0).sum(-1).tolist()
            mass = weights.sort(-1, descending=True).values.cumsum(-1)
            for number, eps in enumerate(plan.eps):
                fewest, most = ((mass < 1 - eps + slack).sum(-1) + 1 for slack in (-1e-4, 1e-4))
                found = torch.from_numpy(piece.support[number, level, layer])
                assert ((found >= fewest) & (found <= most)).all()


def test_the_predicted_loss_is_that_of_the_fisher_information():
    # A nudge of one head's output at one row changes the distribution of every later token; half the gradient's square
    # along the nudge, over tokens that the model draws, is the divergence from what it was.
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 32)
    direction, gradients = torch.randn(16), []

    def nudged(size: float) -> torch.Tensor:
        with observed(model, lambda call: call.output[:, 1, 20].add_(size * direction)), torch.no_grad():
            return torch.log_softmax(model(ids).logits[0].double(), -1)

    def keep(call):
        call.output.register_hook(lambda g: gradients.append(float(g[0, 1, 20] @ direction)))

    before, after = nudged(0.0), nudged(0.05)
    divergence = float((before.exp() * (before - after)).sum()) / 0.05**2
    for seed in range(60):
        with observed(model, keep), measure.evaluating(model):
            measure.loss_of_drawn_tokens(model(ids).logits, seed).backward()
    assert np.mean(np.square(gradients)) / 2 == pytest.approx(divergence, rel=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated_densely_and_left_as_it_was(family):
    model, ids = tiny_model(family), random_ids(1, 60)
    logits = model(ids).logits
    model.train()
    model.model.layers[1].eval()
    before = state_of(model)
    text = random_ids(300).tolist()
    with torch.device("meta"):  # a default device where nothing is computed
        profile = calibrate(model, None, [text], LENGTHS, pieces=2, rows=6)
    assert state_of(model) == before
    assert torch.equal(model.eval()(ids).logits, logits)
    windows = {"mistral": (11, 11, 11), "gemma2": (9, 0, 9), "gpt_oss": (7, 0, 7)}
    assert profile.windows == windows.get(family, (0, 0, 0))
    assert profile.alpha.shape == (3, 4)
    assert [fit.eps for fit in profile.fits] == [0.02, 0.05, 0.1, 0.2]
    assert (profile.sensitivity >= 0).all()
    assert profile.sensitivity.max() > 0
    patch_model(model, 2.0, 0.0, selection="topk")
    assert calibrate(model, None, [text], LENGTHS, pieces=2, rows=6) == profile
    assert nc_stats(model)["attended_fraction"] is None  # nothing ran under the patch that is back
    model(ids)
    assert nc_stats(model)["mean_keys"] < 2.1


def test_the_model_is_restored_when_the_pass_with_gradients_fails():
    model = tiny_model("llama")
    before, stop = state_of(model), Mock(side_effect=[None, None, None, None, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        measure_piece(model, random_ids(128).tolist(), Plan(LENGTHS, 6, (0.1,)), stop)
    assert state_of(model) == before


def test_nothing_of_the_size_of_the_score_matrix_is_made():
    model = tiny_model("llama", max_position_embeddings=2048)
    with torch.profiler.profile(profile_memory=True) as seen:
        measure_piece(model, random_ids(1024).tolist(), Plan((64, 1024), 4, (0.1,)))
    assert 1024 * 64 < max(event.self_cpu_memory_usage for event in seen.events()) <= 1024 * 1024


def test_texts_are_cut_evenly_and_do_not_overlap():
    tokenizer = tiny_tokenizer(bos=True)
    texts = [tiny_text(1000, 1), tiny_text(100, 2)]
    pieces = cut_pieces(tokenizer, texts, 50, 5)
    assert len(pieces) == 5
    assert all(len(piece) == 50 and piece[0] == tokenizer.bos_token_id for piece in pieces)
    bodies = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [bodies[0][start : start + 49] for start in (0, 490, 931)] == [piece[1:] for piece in pieces[:3]]
    assert [bodies[1][start : start + 49] for start in (0, 49)] == [piece[1:] for piece in pieces[3:]]
    assert cut_pieces(None, [list(range(100))], 50, 2) == [list(range(50)), list(range(50, 100))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a text"}, "texts must be a list"),
        ({"texts": [IDS[:100], IDS]}, "text 0 has 100 tokens, and the longest length is 128"),
        ({"texts": [IDS], "pieces": 9}, "the texts hold 3 pieces of 128 tokens, and 9 are asked for"),
        ({"lengths": [128, 128]}, "at least two different numbers of tokens, each at least 16, got .128, 128."),
        ({"lengths": [64, 4096]}, "beyond the 512 positions"),
        ({"target": 1.0}, "target must be a number in .0, 1., got 1.0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(measure, "row_curves", None)
    given = {"tokenizer": None, "texts": [IDS], "lengths": LENGTHS, "pieces": 1, "rows": 6}
    with pytest.raises(ProfileError, match=message):
        calibrate(tiny_model("llama"), **given | arguments)


def test_models_that_give_nan_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ProfileError, match="holds NaN or Inf on this text"):
        calibrate(model, None, [IDS], LENGTHS, pieces=1, rows=6)


def test_the_profile_says_what_it_was_made_of():
    model, tokenizer, text = tiny_model("llama"), tiny_tokenizer(), tiny_text(900)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    profile = calibrate(model, tokenizer, [text], LENGTHS, pieces=2, rows=6)
    assert (profile.lengths, profile.pieces, profile.model_class) == (LENGTHS, 2, "LlamaForCausalLM")
    tokens = np.array(cut_pieces(None, [ids], LENGTHS[-1], 2), dtype=np.int64)
    assert profile.texts == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert set(profile.versions) == {"nc_patch", "torch", "transformers", "python"}
    assert profile.aim == "95 % of every head's mass"
    assert profile == calibrate(model, None, [ids], LENGTHS, pieces=2, rows=6)


# Laws

LOG_LENGTHS = np.log([256.0, 512.0, 1024.0, 2048.0, 4096.0])[:, None]


def counts(C: float, pieces: int, noise: float, between: float, seed: int) -> np.ndarray:
    """log k ``[P, L, 1, H, R]`` of a law 3 n^C of 40 heads, with noise of rows and of pieces."""
    generator = np.random.default_rng(seed)
    of_piece = between * generator.standard_normal((pieces, 1, 1, 40, 1))
    of_row = noise * generator.standard_normal((pieces, len(LOG_LENGTHS), 1, 40, 16))
    return np.log(3) + C * LOG_LENGTHS[..., None, None] + of_piece + of_row


def test_an_exact_law_is_found_and_a_law_that_bends_has_a_wide_interval():
    exact, straight = counts(0.6, 3, 0.0, 0.0, 0), counts(0.5, 3, 0.01, 0.0, 0)
    bent = straight + 0.1 * (LOG_LENGTHS - LOG_LENGTHS.mean())[..., None, None] ** 2
    fit, narrow, wide = (fit_power_laws(LOG_LENGTHS, log_k, 0.1) for log_k in (exact, straight, bent))
    for found, expected in ((fit.C, 0.6), (fit.alpha, 3.0), (fit.C_low, 0.6), (fit.C_high, 0.6)):
        assert found == pytest.approx(expected, rel=1e-9)
    assert (wide.C_high - wide.C_low).mean() > 3 * (narrow.C_high - narrow.C_low).mean()


def test_one_length_that_lies_off_hardly_moves_the_slope_which_stays_within_0_and_1():
    points = np.log(3) + 0.5 * LOG_LENGTHS[..., None]
    points[2] += 2.0
    assert np.ravel(theil_sen(LOG_LENGTHS, points)) == pytest.approx([0.5, np.log(3)], abs=1e-9)
    outside = (theil_sen(LOG_LENGTHS, slope * LOG_LENGTHS[..., None])[0].item() for slope in (-0.4, 1.3))
    assert list(outside) == [0.0, 1.0]


def test_lengths_that_are_all_the_same_say_nothing_of_the_slope():
    fit = fit_power_laws(np.full((3, 1), np.log(100.0)), np.full((2, 3, 1, 2, 4), np.log(10.0)), 0.1)
    assert [np.unique(values).tolist() for values in (fit.C, fit.C_low, fit.C_high)] == [[0], [0], [1]]
    assert fit.alpha == pytest.approx(10.0)


@pytest.mark.parametrize("pieces", [3, 6])
def test_nine_intervals_of_ten_hold_the_exponent(pieces):
    fits = [fit_power_laws(LOG_LENGTHS, counts(0.5, pieces, 0.4, 0.2, seed), 0.1, seed) for seed in range(6)]
    assert 0.82 <= np.mean([(fit.C_low <= 0.5) & (fit.C_high >= 0.5) for fit in fits]) <= 1.0
