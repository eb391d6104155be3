"""Every launch of the library, recorded and compiled for each target without a GPU, and the registers that it needs.

``python tests/recorded_launches.py`` prints them, and exits with 1 if one does not fit. ``--write`` writes them to the
record, in which each has a line: ``git diff`` shows what a change costs. ``--match`` and ``--targets`` narrow both. A
launch is named after its kernel and the first of ``CASES`` that makes it.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

import nc_patch
from nc_patch import functional
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention, summarize_slots_

RECORD = Path(__file__).parent.parent / "docs" / "results" / "kernel_resources.json"
# What is called: FAMILY-DTYPE-dHEAD_DIM and options. The families are the rows of a selection, "blocks" and "pages" of
# ``block`` in a prompt and while decoding, "codes" of ``topk`` while decoding, and the building of each index.
_CASES = """
{topk,window}-bf16-d{64,80,96,128,192,192v128,256}
{topk,window}-fp32-d{64,128,256}
{topk,window}-{bf16,fp32}-d{64,128,256}-few_rows
{topk,window}-bf16-d{64,128,256}-sinks-softcap-stats
{topk,window}-{fp16-d128,fp32-d128-sinks-softcap-stats}
topk_tail-bf16-d{64,80,128,192,256}
topk_tail-{bf16-d64,bf16-d128,bf16-d256,fp32-d128}-few_rows
topk_tail-{bf16,fp32}-d{64,128,256}-sinks-softcap-stats
topk_tail-fp16-d128
blocks-bf16-{d64-k16,d80-k16,d128-k16,d128-k32,d128-k64,d128-k128,d192v128-k16,d256-k16,d256-k128}
blocks-{bf16-d64-k32,bf16-d128-k16,bf16-d128-k32,bf16-d256-k16,bf16-d256-k32,fp32-d128-k16}-sinks-softcap-stats
blocks-{fp16-d128-k16,fp32-d64-k16,fp32-d128-k32,fp32-d256-k16}
blocks-bf16-d128-k16{-audit,-min_mass,-min_mass-audit}
encode-{bf16-d64,bf16-d80,bf16-d128,bf16-d256,fp16-d80,fp32-d128,fp32-d256}
summarize-{bf16-d128-p128,fp16-d80-p64}
pages-{bf16-d64-p16,bf16-d64-p16-many_pages,bf16-d128-p32,bf16-d128-p128-softcap,bf16-d256-p128-softcap}
pages-{bf16-d64-p16,bf16-d128-p32,bf16-d256-p128-softcap,fp16-d96-p64-sinks,fp32-d128-p128-softcap}-paged
pages-{fp16-d96-p64,fp16-d96-p64-sinks-stats,fp32-d128-p128-softcap,fp32-d256-p32}
codes-bf16-{d128-q1,d64-q1-bounds,d128-q16-bounds,d256-q16-bounds}{,-tail}
codes-fp32-d128-q1-bounds{,-tail,-sinks-few_heads}
codes-{bf16-d80,fp32-d256}-q1-tail
"""
_MATRIX_INSTRUCTION = re.compile(r"wgmma\.mma_async|mma\.sync\.aligned\.m\d+n\d+k\d+|tcgen05\.mma|v_mfma_\w+")


def expanded(patterns: str) -> tuple[str, ...]:
    """Patterns with spaces between: ``"a{b,c}"`` as ``"ab"`` and ``"ac"``."""
    found: list[str] = []
    for pattern in patterns.split():
        parts = enumerate(re.split(r"{(.*?)}", pattern))
        found += map("".join, product(*(part.split(",") if i % 2 else [part] for i, part in parts)))
    return tuple(found)


CASES = expanded(_CASES)


class Target(NamedTuple):
    """An architecture to compile for, and what one program may use there: bytes of shared memory, and registers."""

    gpu: GPUTarget
    shared_limit: int
    register_limit: int = 65536


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 4 * 64 * 512),
}


class Launch(NamedTuple):
    """What Triton would compile for a launch: the kernel, and what it specialises it for."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class Resources(NamedTuple):
    """What one compiled launch needs on one target.

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
    matrix: list[str]
    triton: str = triton.__version__

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and one program's shared memory and registers (given out in eights) are there."""
        registers = (self.registers + 7) // 8 * 8 * self.threads
        fits = registers <= TARGETS[self.target].register_limit and self.shared <= self.shared_limit
        return fits and self.spills == 0


def call(case: str) -> None:
    """Calls the library as ``case`` says; only shapes, dtypes and strides mean something."""
    family, dtype_name, *options = case.split("-")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    numbers = dict(re.findall(r"([dvkpq])(\d+)", "-".join(options)))
    head_dim = int(numbers.get("d", 128))
    block_size = int(numbers.get("k", numbers.get("p", 32)))
    decodes, few = family in ("codes", "pages"), "few_rows" in options
    keys = 65536 if "many_pages" in options else 16384 if decodes else 100 if few else 300
    queries = int(numbers.get("q", 1 if decodes or few else keys))
    kv_heads = 1 if "few_heads" in options else 8 if decodes and "many_pages" not in options else 2
    if "paged" in options:
        _call_paged(dtype, head_dim, block_size, options)
        return
    query = _long(torch.empty(1, 4 * kv_heads, queries, head_dim, dtype=dtype))
    key = _long(torch.empty(1, kv_heads, keys, head_dim, dtype=dtype))
    value = _long(torch.empty(1, kv_heads, keys, int(numbers.get("v", head_dim)), dtype=dtype))

    def index(kind: Any) -> nc_patch.KeyIndex:
        return nc_patch.KeyIndex.build(key, kind, value=value, block_size=block_size, backend="triton")

    def long_index(kind: str) -> nc_patch.KeyIndex:
        built = index(kind)
        for tensor in built.tensors():
            if tensor.dim() > 3 or tensor.shape[-1] >= keys:
                tensor.set_(_long(tensor))
        return built

    if family in ("encode", "summarize"):
        index({"encode": "codes", "summarize": "pages"}[family])
        return
    # Budgets of "blocks" leave some out; the others' are as of 131,072 keys. What is compiled follows from both.
    alpha, sizes = (64.0, {"block_size": block_size}) if family == "blocks" else (2354.0, {})
    with _auditing() if "audit" in options else nullcontext():
        nc_patch.sparse_attention(
            *(query, key, value),
            alpha=alpha,
            dense_below=0,
            selection={"window": "window", "blocks": "block", "pages": "block"}.get(family, "topk"),
            softcap=30.0 if {"softcap", "bounds"} & {*options} else None,
            sinks=torch.zeros(4 * kv_heads) if "sinks" in options else None,
            index=long_index(family) if decodes else None,
            means=long_index("means") if "tail" in options else None,
            return_stats="stats" in options,
            return_kept_mass="bounds" if "bounds" in options else None,
            tail="mean" if family == "topk_tail" or "tail" in options else "drop",
            backend="triton",
            min_mass=0.9 if "min_mass" in options else None,
            **sizes,
        )


def _call_paged(dtype: torch.dtype, head_dim: int, page_size: int, options: Sequence[str]) -> None:
    """Decoding over blocks of 128 keys, and new keys in them, as serving engines call it: 4 rows of 16,384 keys."""
    shape = (1, 2, 128, head_dim)
    key, value = (_long(torch.empty(shape, dtype=dtype)) for _ in "kv")
    codes = _long(torch.empty(1, 2, 128 // page_size, 3, head_dim, dtype=torch.int8))
    paged = PagedKeys(key, value, codes, torch.empty(codes.shape[:-1]), page_size)
    summarize_slots_(paged, torch.zeros(4, dtype=torch.int64), "triton")
    numbers = torch.ones(4, 128, dtype=torch.int32)
    paged_block_attention(
        torch.empty(4, 8, head_dim, dtype=dtype),
        paged,
        PagedRows(numbers, numbers[:, 0], numbers[:, :1], 2354),
        scale=1.0,
        softcap=30.0 if "softcap" in options else 0.0,
        sinks=torch.zeros(8) if "sinks" in options else None,
        backend="triton",
    )


def _auditing() -> AbstractContextManager[Any]:
    """Within it ``sparse_attention`` asks for an audit, as only patched models do."""
    attend = functional.attend
    return mock.patch.object(functional, "attend", lambda problem, *rest: attend(problem._replace(audit_seed=0), *rest))


def _long(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it lies in a long cache: its strides between sequences need 64 bits, its memory is beyond 2 GiB."""
    memory = torch.empty(2**31 // tensor.itemsize + tensor.numel(), dtype=tensor.dtype)  # that is never touched
    return memory.as_strided(tensor.shape, (2**31, *tensor.stride()[1:]))


def name_of(launch: Launch, case: str) -> str:
    """The name of a launch in a case: that of its kernel, or of the selection where several share a kernel."""
    family, _, rest = case.partition("-")
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    if name == "attend" and family in ("topk", "topk_tail", "window"):
        name = family
    elif name == "threshold" and family == "topk_tail":
        name = "threshold_tail"
    elif family == "codes" and name not in ("encode", "means"):
        name = f"codes_{name}"
    return f"{name}-{rest}"


def library_modules() -> list[ModuleType]:
    """Every module of the library but those that need vLLM and the one that is a program."""
    names = (module.name for module in pkgutil.walk_packages(nc_patch.__path__, "nc_patch."))
    return [importlib.import_module(name) for name in names if not re.search(r"\.(vllm\.|__main__$)", name)]


def library_kernels() -> set[Any]:
    """Every kernel of the library."""
    values = [item for module in library_modules() for item in vars(module).items()]
    return {value for name, value in values if name.endswith("_kernel") and hasattr(value, "arg_names")}


@contextmanager
def pretended(target: str, **driven: Any) -> Iterator[None]:
    """Within it Triton and ``nc_patch`` take the CPU for a GPU of ``TARGETS``; ``driven`` are parts of its driver."""
    gpu = SimpleNamespace(
        get_current_target=lambda: TARGETS[target].gpu,
        get_current_device=lambda: target,  # a device of its own, for what Triton keeps of each
        get_current_stream=lambda _: 0,
        **driven,
    )
    stand_ins = {"triton_problem": lambda device: None, "architecture_of": lambda device: target}
    modules = library_modules()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", gpu))
        for function, stand_in in stand_ins.items():
            having = [module for module in modules if hasattr(module, function)]
            if not having:
                raise LookupError(f"nc_patch has no function {function} any more; name here what asks for the device")
            for module in having:
                stack.enter_context(mock.patch.object(module, function, stand_in))
        yield


@contextmanager
def hooked(target: str, hook: Callable[..., bool]) -> Iterator[None]:
    """Within it launches are of a GPU that Triton takes for there; ``hook`` sees what each would compile."""
    with pretended(target), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        yield


def recorded(target: str, cases: Sequence[str] | None = None) -> dict[str, Launch]:
    """The launches of ``cases``, or of all, on a target by name, equal ones once; nothing is compiled or run.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, so that nothing is launched.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile the kernels")
    launches: dict[str, Launch] = {}
    seen: set[tuple[Any, ...]] = set()

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (key := (fn.module, fn.name, compile["key"])) not in seen:
            seen.add(key)
            # The one place where Triton shows a hook all options.
            options = json.loads(compile["specialization_data"])["options"]
            options = {option: _as_tuples(value) for option, value in options.items()}
            specialised = (compile["signature"], compile["constants"], compile["configs"][0])
            launch = Launch(fn.jit_function, *specialised, options)
            name = name_of(launch, case)
            names = (name, *(f"{name}-{number}" for number in range(2, 100)))
            launches[next(free for free in names if free not in launches)] = launch
        return True  # by which Triton leaves it at that

    with torch.inference_mode(), hooked(target, record):
        for case in CASES if cases is None else cases:
            call(case)
    return launches


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def resources_of(name: str, launch: Launch, target: str) -> Resources:
    """Compiles a launch for a target of ``TARGETS`` and reads its resources from the machine code."""
    gpu, limit, _ = TARGETS[target]
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    text = compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    if gpu.backend == "cuda":
        registers, spills = _cubin_usage(compiled.asm["cubin"])
    else:
        found = (re.findall(rf"\.{key}:\s+(\d+)", text)[0] for key in ("vgpr_count", "vgpr_spill_count"))
        registers, spills = map(int, found)
    matrix = sorted(set(_MATRIX_INSTRUCTION.findall(text)))
    threads = launch.options["num_warps"] * gpu.warp_size
    return Resources(name, target, registers, threads, compiled.metadata.shared, limit, spills, matrix)


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


def read_record() -> dict[tuple[str, str], Resources]:
    """The rows of the record by variant and target."""
    return {(row["variant"], row["target"]): Resources(**row) for row in json.loads(RECORD.read_text())["kernels"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what is named and prints each row; 1 if any does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures (all)")
    parser.add_argument("--match", default="", help="only launches whose name this regular expression is found in")
    parser.add_argument("--write", action="store_true", help="write the rows to the record")
    chosen = parser.parse_args(arguments)
    launches = {target: recorded(target) for target in (TARGETS if chosen.write else chosen.targets)}
    rows = []
    for target in chosen.targets:
        for name, launch in launches[target].items():
            if re.search(chosen.match, name):
                rows.append(row := resources_of(name, launch, target))
                numbers = f"{row.registers:>5} registers {row.shared:>7} bytes shared {row.spills:>4} spills"
                print(f"{name:<60}{target:<8}{numbers}", flush=True)
    if chosen.write:
        table = {**read_record(), **{(row.variant, row.target): row for row in rows}}
        names = {name: None for named in launches.values() for name in named}
        kept = [table[x] for x in product(names, TARGETS) if x in table and x[0] in launches[x[1]]]
        # One kernel a line, so that a change of one shows as one.
        kernels = ",\n".join(json.dumps(row._asdict()) for row in kept)
        head = json.dumps({"command": "python tests/recorded_launches.py --write"})[:-1]
        RECORD.write_text(f'{head}, "kernels": [\n{kernels}\n]}}\n')
    return int(not all(row.fits for row in rows))


if __name__ == "__main__":
    sys.exit(main())
