"""``nc-patch calibrate``: the files it writes, how it refuses and shares, and what takes its profile."""

import pandas as pd
import pytest
from processes import command, run_ranks
from profiles import made_up_profile
from tiny_sweep import sweep_arguments, tiny_files

from eval_tasks.methods import METHODS, Budgets, budget_at, total_of
from eval_tasks.store import read_rows, read_run
from nc_patch import NCConfig, Profile
from nc_patch.calibration import measure
from nc_patch.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrate")


def arguments(home, out, *further):
    sizes = "--lengths 32 64 128 --pieces 3 --rows 4 --device cpu"
    return ["calibrate", *tiny_files(home), "--out", str(home / out), *sizes.split(), *further]


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


def test_two_processes_find_what_one_does(home, calibrated):
    codes, said = run_ranks(home, command, *[(arguments(home, "two"),)] * 2)
    assert codes == [0, 0], said
    assert Profile.load(home / "two" / "profile.json") == Profile.load(calibrated)


def _without_curves():
    measure.row_curves = None


def test_when_one_process_fails_the_other_says_so_and_ends(home):
    codes, said = run_ranks(home, command, *((arguments(home, "failed"), setup) for setup in (None, _without_curves)))
    assert codes == [2, 1], said
    assert "because another process failed: process 1: TypeError" in said[0]
    assert "not callable" in said[1]


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
    sweep = sweep_arguments(home, home / "sweep", "--methods", "dense", "nc-topk", "--profile")
    assert main([*sweep, str(calibrated)]) == 0
    assert {row["method"] for row in read_rows(home / "sweep")} == {"dense", "nc-topk", "profile"}
    assert read_run(home / "sweep")["identity"]["methods"] == ["dense", "nc-topk", "profile"]
    assert main([*sweep, str(home / "changed.json")]) == 2
    assert "profile was" in capsys.readouterr().err
