"""What the operations take: dtypes of any backend, queries of a decoding step, and head dimensions of the kernels."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Most queries of a call that count as decoding: several at once verify what another model has proposed (20 by default).
MAX_DECODE_QUERIES = 32
# The largest head_dim of keys and of values for which the Triton kernels have tiles.
MAX_HEAD_DIM = 256
