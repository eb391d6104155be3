"""Sparse attention with an n^C budget for Hugging Face models.

``patch_model(model, alpha, C)`` makes every query attend ``k(n) = alpha * n**C`` of the n keys it may see (arXiv
2404.02690). Importing the package registers one attention implementation, ``"nc_sparse"``, with ``transformers``;
nothing else happens.
"""

from nc_patch.cache import forget_index
from nc_patch.calibration.calibrate import calibrate
from nc_patch.calibration.profile import Profile
from nc_patch.common import (
    BrokenCacheError,
    DroppedMassError,
    ProfileError,
    UnsupportedMaskError,
    UnsupportedModelError,
)
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import AttentionResult
from nc_patch.patch import is_patched, nc_stats, patch_model, patched, reset_stats, unpatch_model
from nc_patch.selections.index import KeyIndex
from nc_patch.version import __version__

__all__ = [
    "AttentionResult",
    "BrokenCacheError",
    "DroppedMassError",
    "KeyIndex",
    "NCConfig",
    "Profile",
    "ProfileError",
    "UnsupportedMaskError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "forget_index",
    "is_patched",
    "nc_stats",
    "patch_model",
    "patched",
    "reset_stats",
    "sparse_attention",
    "unpatch_model",
]
