"""Every kernel that the library launches compiles for every target, fits it and spills nothing; no GPU is needed."""

import functools
import re
from collections import Counter

import pytest
import recorded_launches
import triton
from recorded_launches import TARGETS, expanded, read_record, recorded, resources_of
from triton._utils import find_paths_if
from triton.compiler import ASTSource, code_generator

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set")

# Instructions that spill in any of these, of thousands: none with the pinned Triton. Those of other versions of PyTorch
# allocate registers otherwise. Before 3.7.1 up to five variants spill; with 3.8 ten, 72 in topk of float32 on gfx942
# and up to 22 in the others; with 3.9 four, of attend_blocks and kernels of decoding.
MOST_SPILLS = {"3.7.1": 0, "3.8.0": 72, "3.9.0": 12}.get(triton.__version__, 32)
RECORD = read_record()
launches_of = functools.cache(recorded)


@pytest.fixture(autouse=True)
def returns_are_what_triton_3_6_can(monkeypatch):
    """Later versions let a function return a structure of which a member is None."""
    decide = getattr(code_generator.CodeGenerator, "decide_return_type", None)

    def without_none(self):
        is_none = lambda path, value: len(path) > 1 and getattr(value, "value", value) is None  # noqa: E731
        assert not find_paths_if(self.return_vals, is_none)
        return decide(self)

    if decide is not None:  # in 3.6
        monkeypatch.setattr(code_generator.CodeGenerator, "decide_return_type", without_none)


def hungriest(target):
    """Of each kernel and dtype the variant that needs most registers on a target, by the record; the neediest first."""
    rows = [row for row in RECORD.values() if row.target == target]
    found = {}
    for row in sorted(rows, key=lambda row: row.registers * row.threads, reverse=True):
        found.setdefault(tuple(row.variant.split("-")[:2]), row.variant)
    return found.values()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=() if target == "sm_90" or place < 4 else pytest.mark.wide)
        for target in TARGETS
        for place, name in enumerate(hungriest(target))
    ],
)
def test_kernel_compiles_and_fits(name, target):
    found = resources_of(name, launches_of(target)[name], target)
    assert found.registers > 0
    assert found.spills <= max(RECORD[name, target].spills, MOST_SPILLS)
    assert found._replace(spills=0).fits


def test_every_kernel_of_the_library_is_launched_by_the_cases():
    assert {launch.kernel for launch in launches_of("sm_90").values()} == recorded_launches.library_kernels()


def test_the_record_has_every_launch_and_each_fits_but_for_a_few_registers_of_one_kernel():
    assert RECORD.keys() == {(name, target) for target in TARGETS for name in launches_of(target)}
    assert all(row._replace(spills=0).fits for row in RECORD.values())
    # Saved once by a program, before its loops, and restored behind them.
    spilling = {place: row.spills for place, row in RECORD.items() if row.spills}
    assert all(name.startswith("attend_blocks-") and target == "sm_90" for name, target in spilling)
    assert sorted(spilling.values()) == [1, 1, 1, 3, 4]


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
    # Of keys, of channels, and the largest of each vector.
    assert len(found[0]) == 3
    assert found[0] <= found[1]
