"""Every kernel compiles ahead of time for every target, fits it and spills nothing; no GPU is needed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need triton")

from nc_patch.ops.triton_compile import TARGETS, Resources, Variant, compile_variant, main, variants  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set")

# One of each kernel, tile shape and dtype, with the options that need most; the command line compiles them all.
QUICK = [
    "threshold-bf16-d64",
    "threshold-bf16-d80",
    "threshold-bf16-d128",
    "threshold-bf16-d256",
    "threshold-bf16-d128-few_rows",
    "threshold-fp32-d128",
    "topk-bf16-d64-sinks-softcap-stats",
    "topk-bf16-d128-sinks-softcap-stats",
    "topk-bf16-d256-sinks-softcap-stats",
    "topk-bf16-d96",
    "topk-bf16-d128-few_rows",
    "topk-fp16-d128",
    "topk-fp32-d128",
    "window-bf16-d128",
    "window-fp32-d256",
]
VARIANTS = {str(variant): variant for variant in variants()}


def assert_fits(found: Resources) -> None:
    assert found.registers > 0
    assert 0 < found.shared <= found.shared_limit
    assert found.spills == 0
    assert found.fits


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", QUICK)
def test_kernel_compiles_and_fits(name, target):
    assert_fits(compile_variant(VARIANTS[name], target))


def test_the_recorded_table_has_every_variant_and_each_fits():
    path = Path(__file__).parent.parent / "docs" / "results" / "kernel_resources.json"
    recorded = [Resources(**kernel) for kernel in json.loads(path.read_text())["kernels"]]
    expected = {(name, target) for name in VARIANTS for target in TARGETS}
    assert {(row.variant, row.target) for row in recorded} == expected
    assert all(row.fits for row in recorded)


@pytest.mark.parametrize("target", TARGETS)
def test_both_kernels_score_with_the_same_matrix_instruction(target):
    # A score must have the same bits in the search and in the pass that uses its threshold.
    search, attention = (compile_variant(VARIANTS[f"{kernel}-bf16-d128"], target) for kernel in ("threshold", "topk"))
    assert len(search.matrix) == 1
    assert attention.matrix == search.matrix


def test_variant_names_are_unique_and_quick_ones_exist():
    assert len(VARIANTS) == len(list(variants()))
    assert set(QUICK) <= VARIANTS.keys()


def test_the_table_is_written_as_json(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert main(["--targets", "sm_90", "--match", "threshold-bf16-d64", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    expected = [name for name in VARIANTS if "threshold-bf16-d64" in name]
    assert [kernel["variant"] for kernel in record["kernels"]] == expected
    assert all(name in capsys.readouterr().out for name in expected[:1])


@pytest.mark.parametrize(
    "change", [{"shared": 300_000}, {"spills": 8}, {"threads": 512}], ids=["shared", "spills", "registers"]
)
def test_a_kernel_that_does_not_fit_fails_the_command(change, monkeypatch):
    fitting = Resources("threshold-bf16-d64", "sm_90", 255, 256, 49_152, 232_448, 0, ())
    assert fitting.fits
    too_large = replace(fitting, **change)
    monkeypatch.setattr("nc_patch.ops.triton_compile.compile_variant", lambda variant, target: too_large)
    assert main(["--targets", "sm_90", "--match", "threshold-bf16-d64"]) == 1


def test_compiling_under_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset it"):
        compile_variant(Variant("threshold", next(iter(VARIANTS.values())).dtype, 64), "sm_90")
