"""Profiles: the same after a round trip, applied to a model, refused where damaged; and budgets that are shared."""

import copy
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from profiles import LENGTHS, made_up_profile
from tiny_models import random_ids, tiny_model

from nc_patch import NCConfig, Profile, ProfileError, is_patched, nc_stats, patch_model, patched, unpatch_model
from nc_patch.budget import budget_of
from nc_patch.calibration.fingerprint import weights_fingerprint


def test_a_profile_is_the_same_after_a_round_trip(tmp_path):
    for profile in (made_up_profile(), made_up_profile().at_budget(0.5, n=512, dense_layers=(2,))):
        profile.save(tmp_path / "profile.json")
        again = Profile.load(tmp_path / "profile.json")
        assert again == copy.deepcopy(profile) == profile
        assert again.config() == profile.config()
        assert (again.kept == profile.kept).all()
        assert len(repr(profile)) < 250
    assert made_up_profile(seed=1) != made_up_profile(seed=2)


def test_saving_replaces_the_file_at_once_and_leaves_nothing_else(tmp_path, monkeypatch):
    made_up_profile().save(tmp_path / "profile.json")
    before = (tmp_path / "profile.json").read_bytes()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ProfileError, match="cannot be written: No space left"):
        made_up_profile(seed=3).save(tmp_path / "profile.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"profile.json": before}


def test_at_mass_gives_each_head_the_keys_that_keep_it_and_beyond_the_lengths_its_law_says_what_is_kept():
    profile, fit = made_up_profile().at_mass(0.9), made_up_profile().fits[0]
    found = np.minimum(profile.alpha * 512.0**profile.C, 512)
    expected = np.minimum(fit.alpha / -np.log(0.05) * -np.log(0.1) * 512.0**fit.C, 512)
    # The curves are interpolated between numbers of keys that lie a factor of sqrt(2) apart, from 8 keys on.
    apart = (expected > 12) & (expected < 300)
    assert found[apart] == pytest.approx(expected[apart], rel=0.15)
    kept, low, high = profile.kept_mass(512)
    assert kept[apart] == pytest.approx(0.9, abs=0.03)
    assert ((low <= kept) & (kept <= high)).all()
    near, far = profile.kept_mass(LENGTHS[-1]), profile.kept_mass(4 * LENGTHS[-1])
    inside = fit.support[-1] < 0.8 * LENGTHS[-1]
    assert far[0][inside] == pytest.approx(0.9, abs=0.05)
    assert (far[2] - far[1])[inside].mean() > (near[2] - near[1])[inside].mean()
    with pytest.raises(ProfileError, match="mass must be a number"):
        profile.at_mass(1.5)


def test_a_layer_that_slides_keeps_what_its_budget_for_the_window_keeps_at_every_length():
    profile = made_up_profile(windows=(0, 512, 0)).at_mass(0.8)
    assert (profile.C[1] > 0).all()
    near, far = profile.kept_mass(512)[0][1], profile.kept_mass(16 * LENGTHS[-1])[0][1]
    assert near == pytest.approx(0.8, abs=0.05)
    assert far == pytest.approx(near)


def test_a_head_that_needs_nearly_all_keys_becomes_dense():
    profile = made_up_profile()
    kept, error = profile.kept.copy(), profile.error.copy()
    share = np.minimum(np.array(profile.keys) / np.array(LENGTHS)[:, None], 1.0)
    kept[:, 1, :], error[:, 1, :] = share[:, None], 1 - share[:, None]
    profile = replace(profile, kept=kept, error=error).at_mass(0.98)
    assert (profile.alpha[1] == 1).all()
    assert (profile.C[1] == 1).all()
    sparse = profile.fits[0].support[-1] < 0.5 * LENGTHS[-1]
    assert 0 < sparse.sum() < sparse.size
    assert (profile.is_sparse() == sparse).all()


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
def test_patch_model_takes_a_profile(selection):
    model, ids = tiny_model("llama"), random_ids(1, 200)
    dense = model(ids).logits
    shared = made_up_profile().at_budget(0.4, n=200)
    patch_model(model, profile=shared, selection=selection, tail="drop")
    sparse = model(ids).logits
    assert not torch.allclose(sparse, dense)
    if selection != "block":
        assert nc_stats(model)["attended_fraction"] == pytest.approx(0.4, rel=0.01)
    explicit = NCConfig(shared.alpha.tolist(), shared.C.tolist(), selection=selection, tail="drop")
    unpatch_model(model)
    with patched(model, config=explicit):
        assert torch.equal(model(ids).logits, sparse)
    with patched(model, profile=shared, selection=selection, tail="drop"):
        assert torch.equal(model(ids).logits, sparse)
    assert torch.equal(model(ids).logits, dense)


def test_a_model_of_another_shape_is_refused_and_other_weights_are_warned_of(caplog):
    other, model = tiny_model("llama", num_hidden_layers=2), tiny_model("llama")
    profile = replace(made_up_profile(), fingerprint=weights_fingerprint(model))
    with pytest.raises(ProfileError, match="is for 3 layers of 4 query heads; LlamaForCausalLM has 2 of 4"):
        patch_model(other, profile=profile)
    assert not is_patched(other)
    with caplog.at_level(logging.WARNING, logger="nc_patch"):
        patch_model(model, profile=profile)
        assert not caplog.records
        model.lm_head.weight.data[0, 0] += 1
        patch_model(model, profile=profile)
    assert "another checkpoint or another dtype" in caplog.text


MISSING = object()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # The whole file.
        (None, "cannot be read: No such file"),
        ("\xff", "cannot be read: 'utf"),
        ("[1, 2]", "this is no profile, or one written by a newer nc_patch"),
        # A field of it.
        ({"format": "\u001b[2J"}, "its format must be a number"),
        ({"format": 2}, "written by a newer nc_patch: its format must be a number from 1 to 1, got 2"),
        ({"kept": MISSING}, "the profile is damaged, calibrate again: KeyError: 'kept'"),
        ({"windows": [0]}, r"windows must be finite and of the shape \(3,\), got \[0\]"),
        ({"dense_layers": [3]}, "dense_layers must be a list of layers from 0 to 2"),
        ({"C": [[1.0, 1.0, 1.0, float("nan")]] * 3}, "C must be finite"),
        ({"fits": [{}]}, "the profile is damaged"),
        ({"kept": [[[[1.0]]]]}, "must be finite and of the shape"),
    ],
)
def test_a_file_that_is_damaged_or_no_profile_is_refused_with_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "profile.json"
    if isinstance(damage, dict):
        values = made_up_profile().to_dict() | damage
        damage = json.dumps({name: value for name, value in values.items() if value is not MISSING})
    if damage is not None:
        path.write_bytes(damage.encode("latin-1"))
    with pytest.raises(ProfileError, match=message) as caught:
        Profile.load(path)
    assert str(caught.value).isprintable()


def test_a_file_of_format_1_means_what_it_always_did(tmp_path):
    written = Path(__file__).parent / "data" / "profile_format_1.json"
    profile = Profile.load(written)
    profile.save(tmp_path / "again.json")
    assert Profile.load(tmp_path / "again.json") == profile
    assert (profile.dense_layers, profile.windows) == ((0,), (9, 0))
    alpha = [[1.0] * 4, [15.198517420774024, 21.999978, 21.514911688726237, 26.239918280414848]]
    shared = replace(profile, alpha=np.array(alpha), C=np.array([[1.0] * 4, [0.16368868480511556, 0, 0, 0]]))
    kept, low, high = shared.kept_mass(100)
    assert kept[1] == pytest.approx([0.409288, 0.276782, 0.278546, 0.353993], abs=1e-6)
    assert low[1] == pytest.approx([0.386909, 0.261554, 0.262841, 0.337026], abs=1e-6)
    assert high[1] == pytest.approx([0.431667, 0.292011, 0.294251, 0.370961], abs=1e-6)


# Sharing a budget: what is asked is spent, and no other way of sharing found loses less


def spent(profile, lengths, over: str, dense_below: int = 0) -> float:
    """Attended keys / visible keys, counted one by one with the budget law itself."""
    config, attended, visible = profile.config(), 0, 0
    rows = [row for n in lengths for row in (range(1, n + 1) if over == "sequence" else [n])]
    for layer, window in enumerate(profile.windows):
        seen = [min(row, window or row) for row in rows]
        for alpha, C in config.laws(layer):
            dense = layer in config.dense_layers
            attended += sum(n if dense else budget_of(n, alpha, C, 1, dense_below) for n in seen)
            visible += sum(seen)
    return attended / visible


@pytest.mark.parametrize("windows", [(0, 0, 0), (0, 200, 0)], ids=["global", "one-layer-slides"])
@pytest.mark.parametrize("over", ["sequence", "last"])
@pytest.mark.parametrize("fraction", [0.05, 0.14, 0.5, 1.0])
def test_budgets_sum_to_what_is_asked_at_every_calibrated_length_and_over_all(fraction, over, windows):
    profile = made_up_profile(windows=windows)
    for n in (None, *LENGTHS):
        if fraction * (n or 256) >= 8:  # curves are taken at no fewer keys
            shared = profile.at_budget(fraction, n=n, over=over)
            assert spent(shared, [n] if n else LENGTHS, over) == pytest.approx(fraction, rel=0.01)
    if not any(windows):
        by_keys = profile.at_budget(keys=fraction * (1024 if over == "last" else 512.5), n=1024, over=over)
        assert np.array_equal(by_keys.alpha, shared.alpha)


def test_what_is_dense_counts(dense_with_few_keys):
    profile = made_up_profile()
    for given, below in (({}, 1024), ({"dense_below": 300}, 300), ({"dense_below": 0}, 0)):
        shared = profile.at_budget(0.5, n=2048, **given)
        assert spent(shared, [2048], "sequence", below) == pytest.approx(0.5, rel=0.01)
    shared = profile.at_budget(0.5, n=512, dense_layers=(1,), dense_below=0)
    assert [shared.config().is_dense(layer) for layer in range(3)] == [False, True, False]
    assert spent(shared, [512], "sequence") == pytest.approx(0.5, rel=0.01)


def test_no_exchange_of_keys_between_heads_loses_less():
    profile = made_up_profile()

    def lost(head: tuple[int, int], keys: float) -> float:
        error = np.interp(keys, [*profile.keys[:-1], 1024], [*profile.error[(-1, *head)][:-1], 0.0])
        return float(profile.sensitivity[head] * error)

    def most_gained(taken: np.ndarray) -> float:
        """By an exchange, as a share of all that is lost."""
        heads, gains = list(np.ndindex(*taken.shape)), []
        inner = [at for at in heads if 12 < taken[at] < 512]
        for giver, taker in itertools.permutations(inner, 2):
            moved = 0.35 * min(taken[giver], taken[taker])
            before, after = (lost(giver, taken[giver] - m) + lost(taker, taken[taker] + m) for m in (0.0, moved))
            gains.append(before - after)
        assert len(inner) > 4
        return max(gains) / sum(lost(head, taken[head]) for head in heads)

    shared = profile.at_budget(0.1, n=1024, over="last")
    assert most_gained(shared.alpha * 1024.0**shared.C) < 0.01  # power laws run near what is best at each length
    assert most_gained(np.full((3, 4), 102.4)) > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give fraction, for example"),
        ({"fraction": 0.1, "keys": 3}, "and not both"),
        ({"fraction": 0.0}, "fraction must be a number in .0, 1., got 0.0"),
        ({"fraction": 0.1, "dense_layers": (3,)}, "dense_layers must be a list of layers from 0 to 2"),
        ({"fraction": 0.1, "n": 2048}, "no budgets attend 0.1 .* dense_below=1024"),
        ({"fraction": 0.3, "n": 512, "dense_layers": (1,)}, r"no budgets attend 0.3 of the keys: .* layers \[1\]"),
    ],
)
def test_what_cannot_be_asked_or_had_is_refused(arguments, message, dense_with_few_keys):
    with pytest.raises(ProfileError, match=message):
        made_up_profile().at_budget(**arguments)
