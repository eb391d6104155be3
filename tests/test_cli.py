"""The command line: exit codes and messages, all before any work; and ``nc-patch demo``."""

import importlib.util
from pathlib import Path

import pytest
from processes import python
from tiny_sweep import sweep_arguments, tiny_files

from eval_tasks.methods import METHODS
from eval_tasks.tasks import TASKS
from nc_patch import __version__
from nc_patch.cli import main

PROFILE = Path(__file__).parent / "data" / "profile_format_1.json"


def test_help_lists_and_the_version_are_printed(capsys):
    for arguments, words in (
        (["--help"], ["measure sparse attention by context length"]),
        (["--version"], [__version__]),
        (["eval", "--help"], [*METHODS, "iso: no budgets are equal"]),
        (["eval", "--list-methods"], METHODS),
        (["eval", "--list-tasks"], TASKS),
    ):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert [word for word in words if word not in said] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the tiny model lies."""
    return tmp_path_factory.mktemp("home")


# What only the loaded model shows, when --out is there already.
SHOWN_BY_THE_MODEL = ("does not run on this model and device", "is for 2 layers of 4 query heads")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "usage: nc-patch"),
        ("report .", "holds no measurements"),
        ("eval --out file", "is a file; give a directory"),
        ("eval --model /no/such/model", "no model at /no/such/model"),
        ("eval --trust-remote-code --revision v2", "--revision v2 is for models on the hub"),
        ("eval --text no-such-text", "no text named 'no-such-text'"),
        ("eval --lengths 48 1024", "length 1,024 is beyond the 512 positions"),
        ("eval --lengths 8", "length 8 is too short for the task recall"),
        ("eval --samples 99", "the text has 2,000 tokens; 99 samples of up to 96 tokens need 14,652"),
        ("eval --alpha -1", "alpha must be a positive number"),
        ("eval --device cuda", "torch sees 0 GPUs"),
        ("eval --methods magic", "unknown method 'magic'; allowed are dense, window"),
        ("eval --methods kvpress:SnapKVPress --match iso", "which --match iso cannot set; leave it out"),
        ("eval --methods kvpress:SnapKVPress", "--phase question"),
        ("eval --methods profile", "--profile FILE, from nc-patch calibrate"),
        ("eval --profile /no/such/file", "the profile /no/such/file cannot be read"),
        (f"eval --match iso --profile {PROFILE}", "profile gives each head its own budget, which --match iso"),
        (f"eval --profile {PROFILE}", SHOWN_BY_THE_MODEL[1]),
        ("eval --backend triton", SHOWN_BY_THE_MODEL[0]),
        ("eval --iso-keys 96 --match iso", "(96) holds all keys of every length (48 96)"),
        ("fidelity --methods dense", "dense is no sparse attention of this package"),
        ("fidelity --lengths 32", "--lengths must be at least 64, as many queries as are compared, got 32"),
        ("calibrate --fraction 2", "fraction must be a number"),
        ("calibrate --at 64", "--at and --dense-below say how the budget of --fraction is counted"),
        ("calibrate --lengths 64 128 --fraction 0.1 --dense-below 64", "of all keys, and --fraction is 0.1"),
        ("bench prefill --device cuda", "Use --device cpu"),
        ("bench prefill --set block_size=48", "block_size must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(home, tmp_path, capsys, monkeypatch, line, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("nc_patch.calibration.measure.row_curves", None)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    command, out = line.partition(" --")[0], tmp_path / "out"
    files, where = [*tiny_files(home), "--device", "cpu"], ["--out", str(out)]
    sound = {"eval": sweep_arguments(home, out)[1:], "bench prefill": where}
    sound |= dict.fromkeys(("fidelity", "calibrate"), files + where)
    assert main([*command.split(), *sound.get(command, ()), *line.removeprefix(command).split()]) == 2
    assert message in capsys.readouterr().err
    assert out.exists() == (command in ("fidelity", "calibrate") or message in SHOWN_BY_THE_MODEL)
    assert not any(path.stat().st_size for path in out.glob("*"))


@pytest.mark.parametrize(
    ("name", "file"),
    [("eval", "main.png"), ("fidelity", "fidelity.json"), ("calibrate", "calibration.csv"), ("bench", "decode.json")],
)
def test_a_file_that_has_no_place_is_seen_before_anything_is_measured(name, file, tmp_path, capsys, monkeypatch):
    for measures in ("sweep._measure_all", "fidelity_command.fidelity", "calibrate_command.calibrate"):
        monkeypatch.setattr(f"eval_tasks.{measures}", None)
    monkeypatch.setattr("eval_tasks.bench.command._measure", None)
    (tmp_path / "out" / file).mkdir(parents=True)
    sound = {"eval": sweep_arguments(tmp_path, tmp_path / "out")[1:], "bench": ["decode"]}
    given = [*sound.get(name, tiny_files(tmp_path)), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([name, *given]) == 2
    assert f"cannot be written: {file} is a directory. Give another" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_extra_that_has_them(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["eval", "--list-methods"]) == 2
    assert "eval needs matplotlib: pip install -e '.[eval]' in the checkout of nc_patch" in capsys.readouterr().err


def test_a_profile_needs_neither_scipy_nor_the_harness():
    use = f"import nc_patch; nc_patch.Profile.load({str(PROFILE)!r}).at_mass(0.9).config()"
    loaded = "print([name for name in sys.modules if name.startswith('eval_tasks')])"
    assert python("-c", f"import sys; sys.modules['scipy'] = None; {use}; {loaded}").strip() == "[]"


@pytest.mark.slow
def test_a_real_model_answers_twice(capsys):
    assert main(["demo", "--tokens", "1300", "--answer-tokens", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("s to the first token") == 2
    assert said.count("ms a token") == 2
    shares = said.split("keys read")[1].split("by the prompt")[0]
    assert 20 < int(shares.strip().removesuffix("%")) < 100
    assert "perplexity" in said.split("keys read")[1]
