"""Compiles the kernels ahead of time, which needs no GPU, and reads off the registers and memory that each needs.

``python -m nc_patch.ops.triton.compile`` prints the table and fails if a kernel spills or does not fit.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nc_patch.ops.triton import means as triton_means
from nc_patch.ops.triton import split as triton_split
from nc_patch.ops.triton.attend import attend_kernel
from nc_patch.ops.triton.launch import (
    attend_constants,
    compile_options,
    tail_constants,
    threshold_constants,
    tiles_for,
)
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton.tail import attend_tail_kernel
from nc_patch.selections.block import decode as triton_decode_block
from nc_patch.selections.block import prefill as triton_block
from nc_patch.selections.block import summarize as triton_summarize
from nc_patch.selections.topk import decode as triton_decode_topk
from nc_patch.selections.topk import encode as triton_encode
from nc_patch.selections.topk import tail as triton_decode_tail
from nc_patch.selections.topk.threshold import threshold_kernel


@dataclass(frozen=True)
class Target:
    """An architecture to compile for, and what one program may use there: bytes of shared memory, and registers."""

    gpu: GPUTarget
    shared_limit: int
    register_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 65536),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 65536),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 65536),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 4 * 64 * 512),
}

_MANY_ROWS = 1 << 20
_MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|mma\.sync\.aligned\.m\d+n\d+k\d+|tcgen05\.mma|v_mfma_\w+")


@dataclass(frozen=True)
class Resources:
    """What one compiled variant needs on one target.

    Attributes:
        registers: per thread; on AMD the accumulation registers are counted in. threads: per program.
        shared: bytes of shared memory per program. shared_limit: what the target has.
        spills: on NVIDIA instructions that store a register to local memory; on AMD spilled vector registers.
        matrix: the matrix instructions in the code; empty where the plain floating point units multiply.
        triton: the version that compiled it.
    """

    variant: str
    target: str
    registers: int
    threads: int
    shared: int
    shared_limit: int
    spills: int
    matrix: tuple[str, ...]
    triton: str = triton.__version__

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and one program's shared memory and registers (given out in eights) are there."""
        registers = (self.registers + 7) // 8 * 8 * self.threads
        fits = registers <= TARGETS[self.target].register_limit and self.shared <= self.shared_limit
        return fits and self.spills == 0


def row_specialisations(target: str) -> Iterator[Specialisation]:
    """The kernels over whole rows: of ``topk`` ``threshold`` and ``topk``, with a tail their ``_tail``; of ``window``.

    Every tile shape with each kernel, every head_dim, both 16-bit dtypes, and each option of the kernels.
    """
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for kernel in ("threshold", "topk", "window"):
        for head_dim in (64, 80, 96, 128, 192, 256):
            yield _row_specialisation(kernel, bfloat16, target, head_dim)
        for head_dim in (64, 128, 256):
            yield _row_specialisation(kernel, bfloat16, target, head_dim, few_rows=True)
            yield _row_specialisation(kernel, float32, target, head_dim)
            yield _row_specialisation(kernel, float32, target, head_dim, few_rows=True)
        yield _row_specialisation(kernel, float16, target, 128)
    for kernel in ("topk", "window"):
        for head_dim in (64, 128, 256):
            yield _row_specialisation(kernel, bfloat16, target, head_dim, options=("sinks", "softcap", "stats"))
        yield _row_specialisation(kernel, float32, target, 128, options=("sinks", "softcap", "stats"))
        yield _row_specialisation(kernel, bfloat16, target, 192, 128)
    for kernel in ("threshold_tail", "topk_tail"):
        for head_dim in (64, 128, 256):
            yield _row_specialisation(kernel, bfloat16, target, head_dim)
            yield _row_specialisation(kernel, bfloat16, target, head_dim, few_rows=True)
    for head_dim in (64, 128, 256):
        yield _row_specialisation("topk_tail", bfloat16, target, head_dim, options=("sinks", "softcap", "stats"))
        yield _row_specialisation("topk_tail", float32, target, head_dim, options=("sinks", "softcap", "stats"))
    for head_dim in (80, 192):
        yield _row_specialisation("topk_tail", bfloat16, target, head_dim)
    yield _row_specialisation("topk_tail", float16, target, 128)
    yield _row_specialisation("topk_tail", float32, target, 128, few_rows=True)


def _row_specialisation(
    kernel: str,
    dtype: torch.dtype,
    target: str,
    head_dim: int,
    value_dim: int | None = None,
    few_rows: bool = False,
    options: tuple[str, ...] = (),
) -> Specialisation:
    dims = f"d{head_dim}" + ("" if value_dim is None else f"v{value_dim}")
    name = "-".join([kernel, DTYPE_NAMES[dtype], dims, *(["few_rows"] if few_rows else []), *options])
    value_dim = value_dim or head_dim
    rows = 1 if few_rows else _MANY_ROWS
    tiles = tiles_for(target, dtype, head_dim, value_dim, rows, kernel.endswith("_tail"))
    if kernel.startswith("threshold"):
        function, constants = threshold_kernel, threshold_constants(head_dim, tiles)
    else:
        flags = ("sinks" in options, "softcap" in options, "stats" in options)
        function, constants = attend_kernel, attend_constants(head_dim, value_dim, tiles, kernel == "topk", *flags)
        if kernel == "topk_tail":
            function, constants = attend_tail_kernel, tail_constants(head_dim, value_dim, tiles, *flags)
    types = {
        **dict.fromkeys(("query", "key", "value", "mean_key", "mean_value", "output"), pointer_to(dtype)),
        **dict.fromkeys(("visible", "origin", "budget", "ties_end"), "*i32"),
        **dict.fromkeys(("sinks", "threshold", "lse", "kept_mass"), "*fp32"),
        # Long caches need 64 bits between sequences.
        **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb"), "i64"),
    }
    compiler = compile_options(tiles, target)
    return Specialisation(name, function, constants, types, compiler, data_strides(function, "qkvmw"))


# Where the specialisations come from: a module's kernels are compiled ahead of time by adding its function here.
SOURCES: tuple[Callable[[str], Iterator[Specialisation]], ...] = (
    row_specialisations,
    triton_block.specialisations,
    triton_split.specialisations,
    triton_decode_block.specialisations,
    triton_summarize.specialisations,
    triton_decode_topk.specialisations,
    triton_decode_tail.specialisations,
    triton_encode.specialisations,
    triton_means.specialisations,
)


def specialisations(target: str) -> dict[str, Specialisation]:
    """Every kernel variant for a target of ``TARGETS``, by name.

    Raises:
        ValueError: two variants share a name.
    """
    found: dict[str, Specialisation] = {}
    for source in SOURCES:
        for specialisation in source(target):
            if specialisation.name in found:
                raise ValueError(f"two kernel variants are named {specialisation.name!r}: names must be unique")
            found[specialisation.name] = specialisation
    return found


def compile_specialisation(specialisation: Specialisation, target: str) -> Resources:
    """Compiles one variant for a target of ``TARGETS`` and reads its resources from the machine code.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile the kernels")
    kernel, constants, options = specialisation.kernel, dict(specialisation.constants), dict(specialisation.options)
    signature = {name: specialisation.type_of(name) for name in kernel.arg_names}
    # As at run time: pointers are multiples of 16.
    aligned = [
        i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in specialisation.aligned
    ]
    source = ASTSource(
        kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(source, target=TARGETS[target].gpu, options=options)
    if TARGETS[target].gpu.backend == "cuda":
        registers, spills = _cubin_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    matrix = tuple(sorted(set(_MATRIX_INSTRUCTION.findall(text))))
    threads = options["num_warps"] * TARGETS[target].gpu.warp_size
    return Resources(
        variant=specialisation.name,
        target=target,
        registers=registers,
        threads=threads,
        shared=compiled.metadata.shared,
        shared_limit=TARGETS[target].shared_limit,
        spills=spills,
        matrix=matrix,
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, stores to local memory), as the disassembler that Triton ships shows them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    if found is None or "EXIT" not in code:
        raise RuntimeError(f"{tool} showed no code; it said: {usage.strip() or 'nothing'}")
    return int(found[1]), len(re.findall(r"\bSTL\b", code))


def _table(rows: Sequence[Resources]) -> str:
    lines = [f"{'variant':<44}{'target':<8}{'registers':>10}{'shared':>9}{'limit':>9}{'spills':>8}"]
    lines += [
        f"{r.variant:<44}{r.target:<8}{r.registers:>10}{r.shared:>9}{r.shared_limit:>9}{r.spills:>8}" for r in rows
    ]
    return "\n".join(lines)


def _record(path: Path, rows: Sequence[Resources], names: Sequence[str]) -> None:
    """Writes the table; what it held of variants that still exist and were not compiled now, stays."""
    earlier = [Resources(**row) for row in json.loads(path.read_text())["kernels"]] if path.exists() else []
    table = {(row.variant, row.target): row for row in (*earlier, *rows) if row.variant in names}
    ordered = sorted(table.values(), key=lambda row: (names.index(row.variant), row.target))
    # One kernel a line, so that a change of one shows as one.
    kernels = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in ordered)
    command = "python -m nc_patch.ops.triton.compile --json docs/results/kernel_resources.json"
    path.write_text(f'{json.dumps({"command": command})[:-1]}, "kernels": [\n{kernels}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles every variant for every target and prints or writes the table; 1 if any spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m nc_patch.ops.triton.compile", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures (all)")
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the table to this file, beside what it holds of others")
    chosen = parser.parse_args(arguments)
    rows = []
    variants = {target: specialisations(target) for target in chosen.targets}
    for name in variants[chosen.targets[0]]:
        for target in chosen.targets:
            if chosen.match in name:
                rows.append(compile_specialisation(variants[target][name], target))
                print(f"compiled {name} for {target}", file=sys.stderr)
    print(_table(rows))
    if chosen.json is not None:
        _record(chosen.json, rows, list(variants[chosen.targets[0]]))
    return int(any(not row.fits for row in rows))


if __name__ == "__main__":
    sys.exit(main())
