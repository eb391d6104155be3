"""Which backend runs a call: the one place that decides, what it says of it, and what it refuses."""

import logging

import pytest
import torch
from attention_cases import Shape, random_case
from operations import INSTALLED, problem_of_case

from nc_patch import library, sparse_attention
from nc_patch.common import warn_anew
from nc_patch.ops import backends
from nc_patch.ops.backends import choose_backend
from nc_patch.selections import Block, TopK


@pytest.mark.parametrize(
    ("capability", "hip", "call", "reason"),
    [
        *((*gpu, {}, None) for gpu in (((8, 0), None), ((12, 0), None), ((6, 0), "6.4"))),
        ((8, 0), None, {"head_dims": (192, 288)}, "takes a head_dim of at most 256, got 192 and 288"),
        ((8, 0), None, {"needs_grad": True}, "has no gradient"),
        ((8, 0), None, {"implemented": ("torch",)}, "has no kernel for it"),
        ((7, 5), None, {}, "needs a GPU of compute capability 8.0 or higher, and cuda:0 has 7.5"),
    ],
)
def test_a_gpu_from_ampere_on_or_of_amd_runs_triton_or_pytorch_and_by_name_what_it_cannot_run_is_refused(
    capability, hip, call, reason, monkeypatch
):
    monkeypatch.setattr(backends, "_triton_interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    call = {"device": torch.device("cuda", 0), "head_dims": (128, 256), **call}
    backend, said = choose_backend("auto", **call)
    assert choose_backend("torch", **call) == ("torch", None)
    with pytest.raises(RuntimeError, match="needs the tensors on a CPU, and they are on cuda"):
        choose_backend("cpu", **call)
    if reason is None:
        assert (backend, said) == choose_backend("triton", **call) == ("triton", None)
        return
    assert backend == "torch"
    assert said.startswith(f"Triton {reason}")
    with pytest.raises(RuntimeError, match=f'backend="triton" {reason}.*Use backend="auto" or backend="torch"'):
        choose_backend("triton", **call)


@pytest.mark.parametrize("numba", [True, False])
def test_a_cpu_runs_compiled_kernels_and_without_numba_pytorch(numba, monkeypatch):
    monkeypatch.setattr(backends, "_triton_interprets", lambda: False)
    monkeypatch.setattr(backends, "has_numba", lambda: numba)
    device = torch.device("cpu")
    call = {"head_dims": (512, 512), "implemented": TopK().backends("prefill")}
    missing = "the CPU kernels need Numba (pip install 'nc_patch[cpu]')"
    assert choose_backend("auto", device, **call) == (("cpu", None) if numba else ("torch", missing))
    assert choose_backend("torch", device, **call) == ("torch", None)
    assert choose_backend("auto", device, **call, needs_grad=True)[0] == "torch"
    with pytest.raises(RuntimeError, match="needs a GPU, and the tensors are on cpu"):
        choose_backend("triton", device, head_dims=(64,))
    if not numba:
        with pytest.raises(RuntimeError, match=r"""needs Numba \(pip install 'nc_patch\[cpu\]'\)"""):
            choose_backend("cpu", device, **call)


@pytest.mark.parametrize("way", ["topk", "window", "dense", "block"])
def test_custom_ops_keep_the_contract_of_torch(way):
    for backend in INSTALLED:  # the kernels for CPUs have no gradient, and return what compiled graphs expect
        case = random_case(8, longest=40)
        for t in (case.query, case.key, case.value):
            t.requires_grad_(backend == "torch")
        problem, chosen = problem_of_case(case, stats=True), case.selection(way)
        arguments = (problem.tensors(), *library.arguments(chosen, problem, backend))
        utils = {} if backend == "torch" else {"test_utils": "test_faketensor"}
        torch.library.opcheck(library.operation(chosen, problem, backend), arguments, **utils)


@pytest.mark.parametrize("backend", INSTALLED)
def test_memory_grows_with_keys_and_not_with_queries_times_keys(backend):
    process = pytest.importorskip("psutil").Process()
    # Lq * Lk * heads in float32 would be 288 MB.
    problem = problem_of_case(
        Shape("long", group=1, kv_heads=2, queries=6000, keys=6000, head_dim=16, budget=50).case()
    )
    before = process.memory_info().rss
    for selection in (TopK(), Block()):
        selection.run(problem, backend)
    assert process.memory_info().rss - before < 150e6


@pytest.mark.parametrize(("selection", "head_dim"), [("topk", 512), ("block", 288)])
def test_a_call_that_triton_cannot_run_equals_pytorch_and_says_so_once(selection, head_dim, monkeypatch, caplog):
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)  # as on a GPU, or in the interpreter
    monkeypatch.setattr(backends, "has_numba", lambda: False)
    tensors = [torch.randn(1, 2, 40, head_dim) for _ in range(3)]
    settings, reason = {"alpha": 2.0, "C": 0.5, "selection": selection}, f"head_dim of at most 256, got {head_dim}"
    warn_anew.cache_clear()
    with caplog.at_level(logging.WARNING, "nc_patch"):
        found = [sparse_attention(*tensors, **settings) for _ in range(2)]
    expected = sparse_attention(*tensors, **settings, backend="torch")
    assert all(torch.equal(each, expected) for each in found)
    assert sum(reason in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(RuntimeError, match=reason):
        sparse_attention(*tensors, **settings, backend="triton")
