"""Compiles every kernel for CPUs, or reads it from the disk, so that a test measures and observes nothing of that."""

import torch

from nc_patch import KeyIndex, sparse_attention
from nc_patch.ops.backends import has_numba


def compile_all() -> None:
    """Runs each kernel once."""
    if not has_numba():
        return
    query, key = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 40, 16)
    options = {"alpha": 1.0, "C": 0.5, "backend": "cpu"}
    for tensors in ((query, key, key), (query.bfloat16(), *(key.bfloat16(),) * 2)):
        for selection in ("topk", "block", "window", "dense"):
            sparse_attention(*tensors, selection=selection, **options)
    codes, pages = (KeyIndex.build(key, kind, backend="cpu") for kind in ("codes", "pages"))
    means = KeyIndex.build(key, "means", value=key, backend="cpu")
    sparse_attention(query[:, :, -1:], key, key, index=codes, means=means, **options)
    sparse_attention(query[:, :, -1:], key, key, index=pages, selection="block", **options)
