"""Every kernel that the library launches compiles for every target, fits it and spills nothing; no GPU is needed."""

import functools
import re
from collections import Counter
from itertools import product

import pytest

triton = pytest.importorskip("triton", reason="the kernels need triton")

import recorded_launches  # noqa: E402
from recorded_launches import TARGETS, Resources, expanded, main, recorded, resources_of  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set")

# One of each kernel, tile shape and dtype, with the options that need most; the command line compiles them all.
_QUICK = """
threshold-{bf16-d64,bf16-d80,bf16-d128,bf16-d256,bf16-d128-few_rows,fp32-d128}
topk-{bf16-d64-sinks-softcap-stats,bf16-d256-sinks-softcap-stats,bf16-d96,bf16-d128-few_rows,fp16-d128,fp32-d128}
window-{bf16-d128,fp32-d256}
topk_tail-{bf16-d64,bf16-d256-few_rows,fp32-d128-few_rows}
choose_blocks-{bf16-d64-k16,bf16-d128-k16-min_mass-audit}
attend_blocks-bf16-d256-k128
score_pages-bf16-d256-p128-softcap
{score,attend}_pages-bf16-d128-p32-paged
choose_pages-{bf16-d64-p16,bf16-d64-p16-many_pages}
attend_pages-{bf16-d128-p32,fp32-d128-p128-softcap,fp16-d96-p64-sinks-stats}
summarize-bf16-d128-p128
codes_{scan-bf16-d128-q16-bounds,gather-bf16-d128-q1,gather-bf16-d64-q1-bounds-tail}
codes_{prepare-bf16-d128-q1-tail,guess-bf16-d128-q1}
"""
# Those that a plain run compiles for every target.
_NEEDS_MOST = """
topk-bf16-d128-sinks-softcap-stats
topk_tail-bf16-d128-sinks-softcap-stats
score_blocks-bf16-d128-k16
attend_blocks-bf16-d128-k16-sinks-softcap-stats
codes_{scan-bf16-d128-q1,choose-bf16-d128-q1,gather-bf16-d128-q1-tail}
encode-bf16-d128
"""
NEEDS_MOST, QUICK = expanded(_NEEDS_MOST), expanded(_QUICK)
# Instructions that spill in any of these, of thousands: none with the pinned Triton. Those of other versions of PyTorch
# allocate registers otherwise. Before 3.7.1 up to five variants spill; with 3.8 ten, 72 in topk of float32 on gfx942
# and up to 22 in the others; with 3.9 four, of attend_blocks and kernels of decoding.
MOST_SPILLS = {"3.7.1": 0, "3.8.0": 72, "3.9.0": 12}.get(triton.__version__, 32)
# What spills with the pinned Triton: registers that a program saves once, before its loops, and restores behind them.
SPILLING = {
    ("attend_blocks-bf16-d80-k16", "sm_90"): 1,
    ("attend_blocks-bf16-d128-k16", "sm_90"): 1,
    ("attend_blocks-fp16-d128-k16", "sm_90"): 1,
    ("attend_blocks-bf16-d128-k16-sinks-softcap-stats", "sm_90"): 4,
    ("attend_blocks-bf16-d128-k32-sinks-softcap-stats", "sm_90"): 3,
}
launches_of = functools.cache(recorded)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=() if target == "sm_90" or name in NEEDS_MOST else pytest.mark.wide)
        for name, target in product((*NEEDS_MOST, *QUICK), TARGETS)
    ],
)
def test_kernel_compiles_and_fits(name, target):
    found = resources_of(name, launches_of(target)[name], target)
    assert found.registers > 0
    assert 0 < found.shared <= found.shared_limit
    assert found.spills <= max(SPILLING.get((name, target), 0), MOST_SPILLS)
    assert found._replace(spills=0).fits


def test_every_kernel_of_the_library_is_launched_by_the_cases():
    assert {launch.kernel for launch in launches_of("sm_90").values()} == recorded_launches.library_kernels()


def test_the_record_has_every_launch_and_each_but_those_known_fits():
    record = recorded_launches.read_record(recorded_launches.RECORD)
    assert record.keys() == {(name, target) for target in TARGETS for name in launches_of(target)}
    assert {place: row.spills for place, row in record.items() if not row.fits} == SPILLING
    assert all(row.fits or row.spills for row in record.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", expanded("{topk,topk_tail}-bf16-d{64,128,256}"))
def test_both_kernels_score_tiles_of_the_same_shape_with_the_same_matrix_instruction(case, target):
    # A score must have the same bits in the search and in the pass that uses its threshold.
    launches = recorded(target, [case])
    names = case.replace("topk", "threshold"), case
    shapes = []
    for launch in (launches[name] for name in names):
        shape = launch.kernel.arg_names.index("shape")
        constants = {place[1:]: value for place, value in launch.constants.items() if place[0] == shape}
        shapes.append({place: getattr(value, "value", value) for place, value in constants.items()})
    assert shapes[0] == shapes[1] != {}
    assert launches[names[0]].options == launches[names[1]].options
    if case.endswith("d128"):
        matrix = [{*resources_of(name, launches[name], target).matrix} for name in names]
        assert len(matrix[0]) == 1
        # On AMD's GPUs what a tail multiplies by sixteen pages at a time takes a smaller one besides.
        besides = {"v_mfma_f32_16x16x16_bf16"} if target == "gfx942" and case.startswith("topk_tail") else set()
        assert matrix[1] - besides == matrix[0]


FITTING = Resources("threshold-bf16-d64", "sm_90", 255, 256, 49_152, 232_448, 0, [])


def test_the_command_fails_where_something_differs_and_keeps_what_it_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_launches, "CASES", ("topk-bf16-d64", "window-bf16-d64"))
    monkeypatch.setattr(recorded_launches, "resources_of", lambda name, launch, target: FITTING._replace(variant=name))
    path = tmp_path / "kernels.json"
    command = ["--targets", "sm_90", "--write", str(path), "--match"]
    assert main([*command, "^threshold-bf16-d64$"]) == main([*command, "^window-bf16-d64$"]) == 0
    assert [name for name, _ in recorded_launches.read_record(path)] == ["threshold-bf16-d64", "window-bf16-d64"]
    assert main(["--targets", "sm_90", "--compare", str(path), "--match", "^window-bf16-d64$"]) == 0
    assert main(["--targets", "sm_90", "--compare", str(path), "--match", "^topk-bf16-d64$"]) == 1


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", ["bf16-d128-p32", "fp32-d256-p32"])
def test_a_page_is_summed_in_the_same_order_by_both_kernels_that_summarise_it(case, target):
    # So that an index that is kept has the same bits as one that is built afresh.
    found, launches = [], recorded(target, [f"pages-{case}"])
    for kernel in ("summarize", "score_pages"):
        launch = launches[f"{kernel}-{case}"]
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        text = triton.compile(source, target=TARGETS[target].gpu, options=launch.options).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
        sums = re.findall(r"\(tensor<(\d+x\d+xf32), (#\w+)>\) -> tensor<\d+xf32, #ttg.slice<{dim = (\d)", text)
        found.append(Counter((shape, layouts[layout], axis) for shape, layout, axis in sums))
    assert len(found[0]) == 2
    assert found[0] <= found[1]
