"""``nc-patch calibrate``: the files it writes, how it refuses and shares, and what takes its profile."""

import numpy as np
import pandas as pd
import pytest
from processes import ended, start_ranks
from profiles import made_up_profile
from tiny_sweep import save_tiny_model, sweep_arguments, tiny_text

from eval_tasks.calibrate_command import layer_table, profile_findings
from eval_tasks.matching import Budgets, total_of
from eval_tasks.methods import METHODS, budget_at
from eval_tasks.store import read_rows, read_run
from nc_patch import NCConfig, Profile
from nc_patch.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("calibrate")
    save_tiny_model(home / "model")
    (home / "text.txt").write_text(tiny_text(2000), encoding="utf-8")
    return home


def arguments(home, out, *further):
    shared = ["--model", str(home / "model"), "--text", str(home / "text.txt"), "--out", str(home / out)]
    sizes = ["--lengths", "32", "64", "128", "--pieces", "3", "--rows", "4", "--device", "cpu"]
    return ["calibrate", *shared, *sizes, *further]


@pytest.fixture(scope="module")
def calibrated(home):
    """The file of a profile."""
    assert main(arguments(home, "alone")) == 0
    return home / "alone" / "profile.json"


def test_it_writes_a_profile_a_table_and_a_picture(home, calibrated):
    profile = Profile.load(calibrated)
    assert (profile.model, profile.lengths) == (str(home / "model"), (32, 64, 128))
    assert calibrated.with_name("calibration.png").read_bytes().startswith(b"\x89PNG")
    assert list(pd.read_csv(calibrated.with_name("calibration.csv"))["layer"]) == [0, 1, 2]


@pytest.mark.parametrize("below", [None, 40])
def test_a_budget_holds_for_rows_that_are_dense_up_to_the_length_that_is_given(home, calibrated, capsys, below):
    given = [] if below is None else ["--dense-below", str(below)]
    assert main(arguments(home, f"below-{below}", "--fraction", "0.3", "--at", "128", *given)) == 0
    found = Profile.load(home / f"below-{below}" / "profile.json")
    assert found == Profile.load(calibrated).at_budget(0.3, n=128, dense_below=below)
    assert found.aim == "30 % of the keys at 128 tokens, sequence"
    assert f"dense_below={NCConfig(1.0).dense_below if below is None else below}." in capsys.readouterr().out


def test_the_heads_that_are_not_sparse_are_named():
    profile = made_up_profile().at_mass(0.9)
    assert "of 12 heads are not sparse, as they need 50 % of the keys or more (layers 1, 2)" in " ".join(
        profile_findings(profile)
    )
    named = [[int(head) for head in heads.split(", ") if head] for heads in layer_table(profile)["heads not sparse"]]
    assert named == [np.flatnonzero(~heads).tolist() for heads in profile.is_sparse()]


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--lengths", "64"), "at least two different numbers of tokens"),
        (("--fraction", "2"), "fraction must be a number"),
        (("--fraction", "0.1", "--at", "0"), "n must be at least 1, got 0"),
        (("--at", "64"), "--at and --dense-below say how the budget of --fraction is counted"),
        (("--fraction", "0.1", "--dense-below", "64"), "attend 0.432 of all keys, and --fraction is 0.1"),
        (("--dense-layers", "9"), "dense_layers must be a list of layers from 0 to 2"),
        (("--text", "no-such-text"), "no text named 'no-such-text'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work_where_it_can_be(home, capsys, monkeypatch, further, message):
    if "attend" not in message:  # which the profile shows
        monkeypatch.setattr("nc_patch.calibration.measure.row_curves", None)
    assert main(arguments(home, "refused", *further)) == 2
    assert message in capsys.readouterr().err
    assert not list(home.glob("refused/*"))


def test_two_processes_find_what_one_does(home, calibrated):
    codes, said, _ = ended(home, start_ranks(home, [arguments(home, "two")] * 2))
    assert codes == [0, 0], said
    assert Profile.load(home / "two" / "profile.json") == Profile.load(calibrated)


@pytest.mark.parametrize("match", ["deploy", "scored", "total"])
def test_the_method_profile_attends_as_many_keys_as_the_others(tmp_path, match):
    made_up_profile().at_mass(0.9).save(tmp_path / "profile.json")
    budgets = Budgets(2.0, 0.5, 256, match=match, profile=str(tmp_path / "profile.json")).at(512)
    config = METHODS["profile"].config(budgets)
    assert config.prefill.tail == "drop"
    if match == "total":
        laws = [law for layer in range(3) for law in config.laws(layer)]
        found = sum(total_of(512, alpha, C) for alpha, C in laws) / len(laws)
        assert found == pytest.approx(total_of(512, 2.0, 0.5), rel=0.01)
    else:
        assert budget_at("profile", budgets, 256 if match == "deploy" else 512) == pytest.approx(
            budgets.laws["fixed"][0], rel=0.02
        )


def test_a_sweep_measures_a_profile_and_keeps_it_apart_from_others(home, calibrated, capsys):
    Profile.load(calibrated).at_mass(0.5).save(home / "changed.json")
    sweep = lambda file: sweep_arguments(  # noqa: E731
        home, home / "sweep", "--profile", str(file), "--methods", "dense", "nc-topk"
    )
    assert main(sweep(calibrated)) == 0
    assert {row["method"] for row in read_rows(home / "sweep")} == {"dense", "nc-topk", "profile"}
    assert read_run(home / "sweep")["identity"]["methods"] == ["dense", "nc-topk", "profile"]
    assert main(sweep(home / "changed.json")) == 2
    assert "profile was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--profile", "/no/such/file"), "the profile /no/such/file cannot be read"),
        (("--match", "iso", "--profile", "PATH"), "profile gives each head its own budget, which --match iso"),
        (("--profile", "OTHER"), "is for 2 layers of 4 query heads"),
    ],
)
def test_profiles_that_a_sweep_cannot_take_are_refused(home, calibrated, capsys, tmp_path, further, message):
    made_up_profile(layers=2, windows=(0, 0)).save(tmp_path / "other.json")
    known = {"PATH": str(calibrated), "OTHER": str(tmp_path / "other.json")}
    assert main(sweep_arguments(home, home / "refused", *(known.get(word, word) for word in further))) == 2
    assert message in capsys.readouterr().err
