"""``nc-patch calibrate``: the files it writes, how it refuses and shares, and what takes its profile."""

import json
from dataclasses import replace

import pytest
from processes import start
from profiles import made_up_profile
from tiny_sweep import save_tiny_model, sweep_arguments, tiny_text

from eval_tasks.errors import EvalError
from eval_tasks.launch import free_port
from eval_tasks.lm_eval.options import read_config
from eval_tasks.matching import MATCHES, Budgets, total_of
from eval_tasks.methods import METHODS, budget_at, find_method
from eval_tasks.profile_report import profile_findings
from eval_tasks.store import read_rows, read_run
from nc_patch import Profile
from nc_patch.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("calibrate")
    save_tiny_model(home / "model")
    (home / "text.txt").write_text(tiny_text(2000), encoding="utf-8")
    return home


def arguments(home, out: str, *further: str) -> list[str]:
    return [
        "calibrate", "--model", str(home / "model"), "--text", str(home / "text.txt"), "--out", str(home / out),
        "--lengths", "32", "64", "128", "--pieces", "3", "--rows", "4", "--device", "cpu", *further,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(home):
    assert main(arguments(home, "alone")) == 0
    return home / "alone"


def test_it_writes_a_profile_a_page_and_a_picture(home, calibrated, capsys):
    profile = Profile.load(calibrated / "profile.json")
    assert profile.model == str(home / "model")
    assert profile.lengths == (32, 64, 128)
    assert (calibrated / "calibration.png").read_bytes().startswith(b"\x89PNG")
    page = (calibrated / "calibration.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 4
    assert "src=" not in page
    assert 'href="http' not in page
    assert "Layer by layer" in page
    assert "nc-patch calibrate --model" in page
    assert main(arguments(home, "alone")) == 0
    said = capsys.readouterr().out
    assert "The exponent C runs from" in said
    assert "profile.json" in said
    assert Profile.load(calibrated / "profile.json") == profile


def test_a_budget_may_take_the_place_of_the_mass(home, calibrated):
    assert main(arguments(home, "alone", "--fraction", "0.3", "--at", "128")) == 0
    profile = Profile.load(calibrated / "profile.json")
    assert profile.aim == "30 % of the keys at 128 tokens, sequence"
    assert main(arguments(home, "alone")) == 0


def test_the_page_escapes_what_comes_from_outside(tmp_path, calibrated):
    from eval_tasks.profile_report import write_profile_report

    profile = replace(Profile.load(calibrated / "profile.json"), model="<script>alert(1)</script>")
    write_profile_report(profile, tmp_path, "nc-patch calibrate --model '<b>'")
    page = (tmp_path / "calibration.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page


def test_findings_name_the_heads_that_are_not_sparse():
    said = " ".join(profile_findings(made_up_profile().at_mass(0.9)))
    assert "of 12 heads are not sparse" in said
    assert "(layers 1, 2)" in said


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--lengths", "64"), "at least two different numbers of tokens"),
        (("--lengths", "64", "1024"), "beyond the 512 positions"),
        (("--pieces", "99"), "the texts hold 15 pieces of 128 tokens, and 99 are asked for"),
        (("--target", "1.5"), "target must be a number in (0, 1), got 1.5"),
        (("--eps", "0"), "eps must be a number in (0, 1)"),
        (("--fraction", "2"), "fraction must be a number in (0, 1]"),
        (("--fraction", "0.1", "--at", "0"), "n must be a positive integer"),
        (("--dense-layers", "9"), "dense_layers must be a list of layers from 0 to 2"),
        (("--text", "no-such-text"), "no text named 'no-such-text'"),
        (("--model", "/no/such/model"), "no model at /no/such/model"),
        (("--device", "abacus"), "device must be"),
        (("--threads", "0"), "argument --threads: must be at least 1, got 0"),
        (("--part", "third"), "invalid choice: 'third'"),
    ],
)
def test_what_does_not_fit_is_refused(home, calibrated, capsys, further, message):
    assert main(arguments(home, "alone", *further)) == 2
    assert message in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused(home, capsys):
    (home / "file").write_text("")
    assert main(arguments(home, "file")) == 2
    assert "is a file; give a directory" in capsys.readouterr().err


def test_two_processes_find_what_one_does(home, calibrated):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start(arguments(home, "two"), home / f"said{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (home / "said0").read_text()
    assert Profile.load(home / "two" / "profile.json") == Profile.load(calibrated / "profile.json")


def test_the_method_profile_attends_as_many_keys_as_the_others(tmp_path):
    path = tmp_path / "profile.json"
    made_up_profile().at_mass(0.9).save(path)
    for match in MATCHES[:3]:
        budgets = Budgets(2.0, 0.5, 256, match=match, profile=str(path)).at(512)
        config = METHODS["profile"].config(budgets)
        laws = [law for layer in range(3) for law in config.laws(layer)]
        assert config.prefill.tail == "drop"
        if match == "total":
            found = sum(total_of(512, alpha, C) for alpha, C in laws) / len(laws)
            assert found == pytest.approx(total_of(512, 2.0, 0.5), rel=0.01)
        else:
            n = 256 if match == "deploy" else 512
            assert budget_at("profile", budgets, n) == pytest.approx(budgets.fixed, rel=0.02)
    with pytest.raises(EvalError, match="needs a calibrated profile: --profile FILE"):
        find_method("profile").config(Budgets(2.0, 0.5, 256))
    with pytest.raises(EvalError, match="cannot be read"):
        find_method("profile").config(Budgets(2.0, 0.5, 256, profile=str(tmp_path / "nothing")))


def test_a_sweep_measures_a_profile_and_keeps_it_apart_from_others(home, calibrated, capsys):
    path = calibrated / "profile.json"
    further = ("--profile", str(path), "--methods", "dense", "nc-topk")
    assert main(sweep_arguments(home, home / "sweep", *further)) == 0
    rows = read_rows(home / "sweep")
    assert {row["method"] for row in rows} == {"dense", "nc-topk", "profile"}
    assert read_run(home / "sweep")["identity"]["methods"] == ["dense", "nc-topk", "profile"]
    changed = home / "changed.json"
    Profile.load(path).at_mass(0.5).save(changed)
    capsys.readouterr()
    again = ("--profile", str(changed), "--methods", "dense", "nc-topk")
    assert main(sweep_arguments(home, home / "sweep", *again)) == 2
    assert "profile was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--methods", "dense", "profile"), "the method profile needs a calibrated profile: --profile FILE"),
        (("--profile", "/no/such/file"), "the profile /no/such/file cannot be read"),
        (("--match", "iso", "--profile", "PATH"), "profile gives each head its own budget, which --match iso"),
        (("--profile", "OTHER"), "is for 2 layers of 4 query heads"),
    ],
)
def test_profiles_that_a_sweep_cannot_take_are_refused(home, calibrated, capsys, tmp_path, further, message):
    made_up_profile(layers=2, windows=(0, 0)).save(tmp_path / "other.json")
    known = {"PATH": str(calibrated / "profile.json"), "OTHER": str(tmp_path / "other.json")}
    assert main(sweep_arguments(home, home / "refused", *(known.get(word, word) for word in further))) == 2
    assert message in capsys.readouterr().err


def test_lm_evals_model_arguments_take_a_profile(calibrated, tmp_path):
    path = str(calibrated / "profile.json")
    config = read_config({"tail": "drop", "selection": "topk", "dense_layers": "0+1"}, profile=path)
    assert config.alpha == Profile.load(path).config().alpha
    assert (config.prefill.tail, config.dense_layers) == ("drop", (0, 1))
    (tmp_path / "broken.json").write_text(json.dumps({"format": 99}))
    for options, given, message in (
        ({"alpha": 2.0}, {"profile": path}, "profile: a profile brings alpha of its own"),
        ({}, {"profile": path, "nc_config": "x.json"}, "nc_config holds every setting: leave out profile"),
        ({}, {"profile": str(tmp_path / "broken.json")}, "written by a newer nc_patch"),
        ({}, {}, "or profile=FILE"),
    ):
        with pytest.raises(EvalError, match=message):
            read_config(options, **given)
