#!/usr/bin/env python3
"""One small call of every selection, of a prompt and of a decoding step, for a memory checker to watch.

``compute-sanitizer --tool memcheck python scripts/small_attention.py`` watches the Triton kernels on a GPU; without one
the PyTorch backend runs. Exits with 99, by which the checker is told to report too, where an output is not finite.
"""

import sys
from collections.abc import Iterator

import torch

from nc_patch import KeyIndex, sparse_attention

# Lengths that fill no tile; of the second sequence the first keys are padding.
_KEYS, _PADDING, _HEADS, _KV_HEADS, _HEAD_DIM = 333, 21, 8, 2, 128


def main() -> int:
    """Makes all calls, says which came out finite, and returns the exit status."""
    torch.manual_seed(0)
    with torch.inference_mode():
        outputs = dict(small_calls(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    wrong = [name for name, output in outputs.items() if not output.isfinite().all()]
    print(f"{len(outputs)} calls, not finite: {', '.join(wrong) or 'none'}")
    return 99 if wrong else 0


def small_calls(device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The outputs of all calls, each with a name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(2, heads, _KEYS, _HEAD_DIM, device=device).to(dtype) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    )
    start = torch.tensor([0, _PADDING], dtype=torch.int32, device=device)
    origin = start[:, None].expand(-1, _KEYS).contiguous()
    position = torch.arange(1, _KEYS + 1, dtype=torch.int32, device=device).expand(2, -1)
    visible = torch.stack((torch.minimum(origin, position), position), -1)
    settings = {"alpha": 2.0, "C": 0.6, "visible": visible, "origin": origin}
    for selection, options in (
        *(("block", {}), ("block", {"min_mass": 0.9}), ("window", {})),
        *(("topk", {"tail": "mean"}), ("topk", {"tail": "drop"})),
    ):
        output = sparse_attention(query, key, value, **settings, selection=selection, **options)
        yield f"prefill {selection} {options}", output
    settings |= {"visible": visible[:, -1:], "origin": origin[:, -1:]}
    for selection, kinds in (("topk", ("codes", "means")), ("topk", ("codes",)), ("block", ("pages",))):
        indexes = {}
        for name, kind in zip(("index", "means"), kinds, strict=False):
            indexes[name] = KeyIndex.build(key, kind, value=value, start=start)
            indexes[name].extend(key, 1, torch.full_like(start, _KEYS), value)
        tail = "mean" if "means" in kinds else "drop"
        output = sparse_attention(query[:, :, -1:], key, value, **settings, **indexes, selection=selection, tail=tail)
        yield f"decoding {selection} by {' and '.join(kinds)}", output


if __name__ == "__main__":
    sys.exit(main())
