"""One model over several devices or processes: the numbers of the model in one place."""

import pytest
from processes import start_ranks
from tiny_sweep import sweep_arguments

from eval_tasks.errors import EvalError
from eval_tasks.models import load_model
from eval_tasks.store import read_rows
from nc_patch.cli import main

FEW = ("--methods", "dense", "nc-topk", "--tasks", "recall", "--samples", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("spread")
    assert main(sweep_arguments(home, home / "whole", *FEW)) == 0
    return home


def losses(out):
    return {(row["length"], row["method"]): row["loss_sum"] for row in read_rows(out)}


def test_a_device_map_changes_no_number(whole):
    assert main(sweep_arguments(whole, whole / "mapped", *FEW, "--device-map", "auto")) == 0
    assert losses(whole / "mapped") == losses(whole / "whole")


def test_a_model_over_two_processes_measures_what_one_does_and_writes_once(whole):
    ranks = start_ranks(whole, ["split", "split"], *FEW, "--tp-plan", "auto")
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (whole / "said0").read_text()
    assert losses(whole / "split") == pytest.approx(losses(whole / "whole"), rel=1e-5)
    assert {row["process"] for row in read_rows(whole / "split")} == {0}
    assert len((whole / "split" / "results.jsonl").read_bytes().splitlines()) == len(losses(whole / "whole"))


def _fast_clock():
    from eval_tasks import run

    run._exceeds = lambda *_: True


@pytest.mark.parametrize("hurried", [0, 1])
def test_processes_that_share_a_model_stop_together_by_the_clock_of_the_first(whole, hurried):
    out = f"clock{hurried}"
    setups = (_fast_clock, None) if hurried == 0 else (None, _fast_clock)
    ranks = start_ranks(whole, [out, out], *FEW, "--tp-plan", "auto", "--minutes", "60", setups=setups)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0], (whole / "said0").read_text()
    assert len(read_rows(whole / out)) == (2 if hurried == 0 else 4)
    assert ("Stopped before the limit" in (whole / "said0").read_text()) == (hurried == 0)


def test_both_ways_at_once_are_refused(whole):
    with pytest.raises(EvalError, match="give one"):
        load_model(str(whole / "model"), device="cpu", device_map="auto", tp_plan="auto")
