"""A made-up profile of the tiny models' shape, whose heads need very different numbers of keys."""

from collections.abc import Sequence

import numpy as np

from nc_patch import Profile
from nc_patch.calibration.fit import Fit
from nc_patch.calibration.measure import Plan

LENGTHS = (128, 256, 512, 1024)


def made_up_profile(windows: Sequence[int] = (0, 0, 0), seed: int = 0) -> Profile:
    """Head (m, h) needs ``scale * n^C`` keys, with a scale and a C of its own; cost is sensitivity times error."""
    generator = np.random.default_rng(seed)
    C = np.linspace(0.1, 0.9, 12).reshape(3, 4)
    scale = np.exp(generator.uniform(0.5, 2.0, C.shape))
    keys = np.array(Plan(LENGTHS, 1, (0.05, 0.2)).keys, dtype=float)
    visible = np.array([[min(n, window or n) for window in windows] for n in LENGTHS], dtype=float)
    needed = scale * visible[..., None] ** C
    error = np.exp(-keys / needed[..., None])
    fits = []
    for eps in (0.05, 0.2):
        support = np.clip(-np.log(eps) * needed, 1, visible[..., None])
        ends = np.clip(C - 0.1, 0, 1), np.clip(C + 0.1, 0, 1)
        fits.append(Fit(eps, -np.log(eps) * scale, C, *ends, np.full(C.shape, 0.1), support))
    return Profile(
        model="made-up",
        model_class="LlamaForCausalLM",
        fingerprint="0" * 16,
        texts="0" * 64,
        pieces=3,
        lengths=LENGTHS,
        visible=visible,
        windows=tuple(windows),
        keys=tuple(int(k) for k in keys),
        kept=1 - error,
        error=error,
        sensitivity=np.exp(generator.uniform(-2.0, 2.0, C.shape)),
        fits=tuple(fits),
        alpha=np.ones(C.shape),
        C=np.ones(C.shape),
        aim="dense",
    )
