"""The kernels for CPUs: what is theirs alone, whatever the threads, the processes, and what is installed."""

import pickle
from pathlib import Path

import pytest
import torch
from processes import python
from tiny_models import random_ids, tiny_model

from nc_patch import KeyIndex, patch_model, sparse_attention

numba = pytest.importorskip("numba")
launch, llvm, vectors = (pytest.importorskip(f"nc_patch.ops.cpu.{name}") for name in ("launch", "llvm", "vectors"))

ROOT = Path(__file__).parent.parent
SELECTIONS = ("topk", "window", "dense", "block")


def test_of_a_first_page_with_one_visible_key_only_that_counts():
    key = 0.001 * torch.randn(1, 1, 320, 16)
    key[:, :, :15] = 3 * torch.randn(1, 1, 15, 16).abs()
    key[:, :, 15] = 0
    key[:, :, 200:216] += 0.02
    query, visible = torch.full((1, 1, 1, 16), 40.0), torch.tensor([[[15, 320]]], dtype=torch.int32)
    index = KeyIndex.build(key, "pages", block_size=16)
    options = {"alpha": 2.2, "C": 0.5, "selection": "block", "visible": visible, "index": index, "return_stats": True}
    found, expected = (sparse_attention(query, key, key, **options, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(found.kept_mass, expected.kept_mass)


def test_results_do_not_depend_on_the_number_of_threads():
    query, key, value = (torch.randn(2, heads, 700, 48) for heads in (6, 2, 2))
    calls = [{"query": query, "selection": name} for name in SELECTIONS]
    for name, kind in (("topk", "codes"), ("block", "pages")):
        calls.append({"query": query[:, :, -1:], "selection": name, "index": KeyIndex.build(key, kind)})
    outputs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        outputs.append([sparse_attention(**call, key=key, value=value, alpha=2.0, C=0.6) for call in calls])
    assert all(torch.equal(x, first) for found in outputs for x, first in zip(found, outputs[0], strict=True))


@pytest.mark.parametrize("by_instruction", [True, False])
def test_products_of_pairs_of_bfloat16_are_exact(by_instruction, monkeypatch):
    if by_instruction and not llvm._PAIRS:
        pytest.skip("this CPU has no instruction for them")
    monkeypatch.setattr(llvm, "_PAIRS", by_instruction)

    @numba.njit
    def multiply(x, y, z, depth):
        vectors.product((x, 4 * depth), 4, (y, 128), (z, 128), depth, 2, 32, 0, 1)

    x, y = (torch.randint(-9, 10, (rows, 22)).bfloat16() for rows in (2, 32))
    pairs, product = y.view(torch.float32).T.contiguous(), torch.empty(2, 32)
    multiply(x.data_ptr(), pairs.data_ptr(), product.data_ptr(), 11)
    assert torch.equal(product, (x.double() @ y.double().T).float())


@pytest.mark.parametrize("selection", ["dense", "window", "topk"])
def test_sums_over_many_keys_lose_no_digits(selection):
    """The error of one running sum grows with the number of keys: of a quarter of a million to two ten-thousandths."""
    n = 1 << 18
    query, key, value = (torch.randn(1, 1, rows, 16) for rows in (2, n, n))
    query[..., 0], query[..., 1:] = 4, 0
    alpha = 1.0 if selection == "dense" else 1 / 16
    options = {"selection": selection, "scale": 1.0, "return_stats": True, "backend": "cpu"}
    options |= {"tail": "drop"} if selection == "topk" else {}
    result = sparse_attention(query, key, value + 1, alpha=alpha, C=1.0, **options)
    scores = (query.double() @ key.double().transpose(2, 3))[0, 0]
    dense = torch.logsumexp(torch.stack((scores[0].index_fill(0, torch.tensor(n - 1), -torch.inf), scores[1])), -1)
    mass = torch.exp(result.lse[0, 0].double() - dense)
    torch.testing.assert_close(result.kept_mass[0, 0].double(), mass, rtol=1e-5, atol=0)
    assert selection != "dense" or torch.allclose(result.lse[0, 0].double(), dense, rtol=0, atol=3e-6)


def attended(seed: int) -> float:
    tensors = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(seed))
    return float(sparse_attention(*tensors, alpha=2.0, C=0.5, dense_below=0).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_attend_alike(method):
    torch.set_num_threads(2)
    here = [attended(seed) for seed in range(4)]
    with torch.multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map_async(attended, range(4)).get(timeout=240) == here


def does_nothing(number):
    pass


def test_what_was_kept_on_the_disk_and_names_what_is_gone_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    launch._compile(does_nothing, numba.int64)
    (file,) = tmp_path.rglob("*.nbi")
    file.write_bytes(pickle.dumps(numba.__version__) + b"cnc_patch.ops.cpu.launch\nGone\n.")
    assert launch._compile(does_nothing, numba.int64)
    assert b"Gone" not in file.read_bytes()


WITHOUT_NUMBA = """
import sys
sys.modules["numba"], sys.stderr = None, sys.stdout
import torch
from nc_patch import KeyIndex, sparse_attention
tensors = [torch.randn(1, 2, 100, 16) for _ in range(3)]
for selection in ("topk", "block", "window", "dense"):
    sparse_attention(*tensors, alpha=2.0, C=0.5, selection=selection)
index = KeyIndex.build(tensors[1], "codes")
sparse_attention(tensors[0][:, :, -1:], *tensors[1:], alpha=2.0, C=0.5, index=index)
try:
    sparse_attention(*tensors, alpha=2.0, C=0.5, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_numba_pytorch_runs_and_says_once_what_to_install():
    said = python("-c", WITHOUT_NUMBA, cwd=ROOT)
    assert "needs Numba (pip install 'nc_patch[cpu]')" in said
    assert "the CPU kernels need Numba" in said


def test_a_backend_by_name_leaves_dense_layers_to_train():
    model = patch_model(tiny_model("llama"), 1.0, 0.6, backend="cpu", dense_below=1024)
    model(random_ids(1, 40), labels=random_ids(1, 40)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
