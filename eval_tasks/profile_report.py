"""What a calibration found: sentences, a table of the layers, and a figure."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from eval_tasks.figures import to_png
from eval_tasks.store import write_atomically
from eval_tasks.summary import csv_of
from nc_patch import budget
from nc_patch.calibration.fit import Fit
from nc_patch.calibration.profile import SPARSE_BELOW, Profile
from nc_patch.config import NCConfig

PROFILE, PROFILE_TABLE, PROFILE_PICTURE = "profile.json", "calibration.csv", "calibration.png"


def write_profile_report(profile: Profile, directory: Path, dense_below: int | None = None) -> list[str]:
    """Writes the table of layers and the picture; returns what ``profile_findings`` says."""
    write_atomically(directory / PROFILE_TABLE, csv_of(layer_table(profile)).encode())
    write_atomically(directory / PROFILE_PICTURE, to_png(profile_figure(profile)))
    return profile_findings(profile, dense_below)


def profile_findings(profile: Profile, dense_below: int | None = None) -> list[str]:
    """What calibration found, as sentences; ``dense_below`` is that of the laws' budget, None for ``NCConfig``'s."""
    fit, longest = shown_fit(profile), profile.lengths[-1]
    C = pd.Series(np.median(fit.C, 1))
    share = np.median(fit.support[-1] / profile.visible[-1][:, None])
    below = NCConfig(1.0).dense_below if dense_below is None else dense_below
    dense = np.argwhere(~profile.is_sparse())
    layers = f" (layers {', '.join(map(str, np.unique(dense[:, 0])))})" if len(dense) else ""
    sentences = [
        f"At {longest:,} tokens the median head holds {100 * (1 - fit.eps):g} % of its mass in {100 * share:.2g} % of "
        "the keys.",
        f"The exponent C runs from {C.min():.2f} in layer {C.idxmin()} to {C.max():.2f} in layer {C.idxmax()} (median "
        f"over heads); over all heads its median is {np.median(fit.C):.2f}.",
        f"The laws of this profile are for {profile.aim}; at {longest:,} tokens they are predicted to keep "
        f"{100 * float(np.mean(profile.kept_mass(longest)[0])):.1f} % of the mass, averaged over heads.",
        f"A query that sees at most {below:,} keys attends them all, and a budget counts that: patch the model with "
        f"dense_below={below}.",
        f"R² of the fits: median {np.median(fit.r2):.2f}; it is low where C is near 0, because there is little to "
        f"explain. Half the width of C's 90 % interval: median {np.median((fit.C_high - fit.C_low) / 2):.2f}.",
        f"{len(dense)} of {fit.C.size} heads are not sparse, as they need {100 * SPARSE_BELOW:g} % of the keys or "
        f"more{layers}.",
    ]
    one = ["One piece of text was read, so the intervals say nothing about other texts."]
    return sentences + one * (profile.pieces == 1)


def layer_table(profile: Profile) -> pd.DataFrame:
    """Medians over heads of exponents, keys, sensitivity and laws, one row a layer.

    Sensitivity is the loss, in nats per token, that an error of unit norm in a head's output adds.
    """
    fit, layers, median = shown_fit(profile), range(profile.shape[0]), lambda values: np.median(values, 1)
    columns = {"layer": layers, "C": median(fit.C), "C, least": fit.C.min(1), "C, most": fit.C.max(1)}
    columns[f"% of keys for {100 * (1 - fit.eps):g} %"] = 100 * median(fit.support[-1]) / profile.visible[-1]
    columns["heads not sparse"] = [", ".join(map(str, np.flatnonzero(row))) for row in ~profile.is_sparse()]
    columns |= {"sensitivity": median(profile.sensitivity), "alpha in force": median(profile.alpha)}
    columns["C in force"] = median(profile.C)
    columns["dense"] = ["yes" if layer in profile.dense_layers else "" for layer in layers]
    return pd.DataFrame(columns)


def shown_fit(profile: Profile) -> Fit:
    """The fit that figures and sentences speak of: that of 95 % of the mass, or the nearest."""
    return min(profile.fits, key=lambda fit: abs(fit.eps - 0.05))


def profile_figure(profile: Profile) -> Figure:
    """Exponents, and shares of the keys attended, by layer and head; and the mass kept by so many keys."""
    fit, longest = shown_fit(profile), profile.lengths[-1]
    seen = np.array([min(longest, window or longest) for window in profile.windows], dtype=float)[:, None]
    attended = 100 * budget.budgets(seen, profile.alpha, profile.C) / seen
    attended[list(profile.dense_layers)] = 100.0
    figure = Figure(figsize=(16, 5), layout="constrained")
    exponents, budgets, mass = figure.subplots(1, 3)
    for axis, values, title, norm in (
        (exponents, fit.C, f"exponent C of the keys that hold {100 * (1 - fit.eps):g} % of the mass", Normalize(0, 1)),
        (budgets, attended, f"% of the keys attended at {longest:,} tokens, log scale", LogNorm()),
    ):
        image = axis.imshow(values.T, norm=norm, aspect="auto", origin="lower")
        axis.set(title=title, xlabel="layer", ylabel="query head")
        axis.locator_params(integer=True)
        figure.colorbar(image, ax=axis, format="{x:g}").ax.yaxis.set_minor_formatter("{x:g}")
    for kept, length in zip(profile.kept, profile.lengths, strict=True):
        keys = [k for k in profile.keys if k < length]
        low, middle, high = np.percentile(100 * kept[..., : len(keys)], (25, 50, 75), axis=(0, 1))
        mass.plot(keys, middle, label=f"{length:,} tokens")
        mass.fill_between(keys, low, high, alpha=0.1, linewidth=0)
    mass.set_xscale("log", base=2)
    mass.xaxis.set_major_formatter("{x:g}")
    mass.set(title="mass kept, median and middle half of the heads", xlabel="keys attended", ylabel="% of the mass")
    mass.grid(alpha=0.3)
    mass.legend(loc="lower right")
    return figure
