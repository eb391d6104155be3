"""Every kernel compiles ahead of time for every target, fits it and spills nothing; no GPU is needed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

from nc_patch.ops.triton import compile as triton_compile  # noqa: E402
from nc_patch.ops.triton.compile import (  # noqa: E402
    TARGETS,
    Resources,
    compile_specialisation,
    main,
    row_specialisations,
    specialisations,
)
from nc_patch.ops.triton.launch import tiles_for  # noqa: E402

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
    "score_blocks-bf16-d128-k32",
    "choose_blocks-min_mass",
    "attend_blocks-bf16-d128-k32-sinks-softcap-stats",
    "attend_blocks-bf16-d256-k128",
    "combine-fp16-s64-sinks-stats",
    "combine-fp32-s256-sinks-stats",
    "score_pages-bf16-d256-p128-softcap",
    "choose_pages-1024",
    "choose_pages-4096",
    "attend_pages-bf16-d128-p32",
    "attend_pages-fp32-d128-p128-softcap",
    "summarize-bf16-d256-p128",
    "codes_scan-bf16-d128-q1-refine",
    "codes_scan-bf16-d128-q16-refine-bounds",
    "codes_score-bf16-d128-q1-refine",
    "codes_choose-bf16-d128-q1-refine",
    "codes_gather-bf16-d128-q1-refine",
    "codes_gather-bf16-d64-q1-refine-bounds-tail",
    "codes_tail-bf16-d128",
    "codes_score_flagged-fp32-d128-q1-refine-bounds",
    "codes_choose_flagged-bf16-d128-q1-refine",
    "codes_gather_flagged-bf16-d128-q1-refine-tail",
    "topk_tail-bf16-d64",
    "topk_tail-bf16-d128-sinks-softcap-stats",
    "topk_tail-bf16-d256-few_rows",
    "topk_tail-fp32-d128-few_rows",
    "threshold_tail-bf16-d128",
    "encode-bf16-d128",
]
# Instructions that spill in any of these, of thousands: none with the pinned Triton. Those of other versions of PyTorch
# allocate registers otherwise. Before 3.7.1 up to five variants spill; with 3.8 ten, 72 in topk of float32 on gfx942
# and up to 22 in the others; with 3.9 four, of attend_blocks, codes_tail and codes_choose.
MOST_SPILLS = {"3.7.1": 0, "3.8.0": 72, "3.9.0": 12}.get(triton.__version__, 32)
VARIANTS = {target: specialisations(target) for target in TARGETS}
NAMES = list(VARIANTS["sm_90"])


def assert_fits(found: Resources) -> None:
    assert found.registers > 0
    assert 0 < found.shared <= found.shared_limit
    assert found.spills <= MOST_SPILLS
    assert replace(found, spills=0).fits


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", QUICK)
def test_kernel_compiles_and_fits(name, target):
    assert_fits(compile_specialisation(VARIANTS[target][name], target))


def test_the_recorded_table_has_every_variant_and_each_fits():
    path = Path(__file__).parent.parent / "docs" / "results" / "kernel_resources.json"
    recorded = [Resources(**kernel) for kernel in json.loads(path.read_text())["kernels"]]
    expected = {(name, target) for name in NAMES for target in TARGETS}
    assert {(row.variant, row.target) for row in recorded} == expected
    assert all(row.fits for row in recorded)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", [("threshold", "topk"), ("threshold_tail", "topk_tail")], ids=["drop", "mean"])
def test_both_kernels_score_with_the_same_matrix_instruction(kernels, target):
    # A score must have the same bits in the search and in the pass that uses its threshold.
    search, attention = (compile_specialisation(VARIANTS[target][f"{name}-bf16-d128"], target) for name in kernels)
    assert len(search.matrix) == 1
    # On AMD's GPUs what a tail multiplies by sixteen pages at a time takes a smaller one besides.
    besides = {"v_mfma_f32_16x16x16_bf16"} if (target, kernels[1]) == ("gfx942", "topk_tail") else set()
    assert {*attention.matrix} - besides == {*search.matrix}


def test_the_kernels_of_a_default_prompt_are_among_the_variants():
    # alpha and C alone: ``topk`` with a tail, in the dtypes of models, over many rows.
    wanted = {"threshold_tail-bf16-d64", "threshold_tail-bf16-d128", "topk_tail-bf16-d64", "topk_tail-bf16-d128"}
    assert wanted <= set(NAMES)
    for target in TARGETS:
        for head_dim in (64, 128, 256):
            tiles = tiles_for(target, torch.bfloat16, head_dim, head_dim, 1 << 20, True)
            found = VARIANTS[target][f"topk_tail-bf16-d{head_dim}"]
            search = VARIANTS[target][f"threshold_tail-bf16-d{head_dim}"]
            assert (found.constants["BLOCK_M"], found.constants["BLOCK_N"]) == (tiles.rows, tiles.keys)
            # Scores have the same bits in both.
            shape = ("D", "BLOCK_M", "BLOCK_N", "BLOCK_D", "CHUNK_D")
            assert [found.constants[name] for name in shape] == [search.constants[name] for name in shape]
            assert found.options == search.options


def test_every_target_has_the_same_variants_and_quick_ones_exist():
    assert all(list(variants) == NAMES for variants in VARIANTS.values())
    assert set(QUICK) <= set(NAMES)


def test_two_variants_of_one_name_are_refused(monkeypatch):
    monkeypatch.setattr(triton_compile, "SOURCES", (row_specialisations, row_specialisations))
    with pytest.raises(ValueError, match="names must be unique"):
        specialisations("sm_90")


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_names_the_arguments_of_its_kernel(name):
    # A misspelt name would leave the type of the real argument to the default.
    found = VARIANTS["sm_90"][name]
    arguments = set(found.kernel.arg_names)
    assert found.constants.keys() <= arguments
    assert found.aligned <= arguments
    assert not found.constants.keys() & found.types.keys()


def test_the_table_is_written_as_json(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert main(["--targets", "sm_90", "--match", "threshold-bf16-d64", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    expected = [name for name in NAMES if "threshold-bf16-d64" in name]
    assert [kernel["variant"] for kernel in record["kernels"]] == expected
    assert all(name in capsys.readouterr().out for name in expected[:1])


@pytest.mark.parametrize(
    "change", [{"shared": 300_000}, {"spills": 8}, {"threads": 512}], ids=["shared", "spills", "registers"]
)
def test_a_kernel_that_does_not_fit_fails_the_command(change, monkeypatch):
    fitting = Resources("threshold-bf16-d64", "sm_90", 255, 256, 49_152, 232_448, 0, ())
    assert fitting.fits
    too_large = replace(fitting, **change)
    monkeypatch.setattr("nc_patch.ops.triton.compile.compile_specialisation", lambda variant, target: too_large)
    assert main(["--targets", "sm_90", "--match", "threshold-bf16-d64"]) == 1


def test_compiling_under_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset it"):
        compile_specialisation(VARIANTS["sm_90"]["threshold-bf16-d64"], "sm_90")
