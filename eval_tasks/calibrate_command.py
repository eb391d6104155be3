"""``nc-patch calibrate``: a model and texts in, ``profile.json`` and a report of it out."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from transformers.utils import logging as transformers_logging

from eval_tasks.arguments import TEXT_FORMS, add_lengths, add_model_options, add_out, load_chosen_model, not_negative
from eval_tasks.errors import EvalError
from eval_tasks.figures import to_png
from eval_tasks.processes import device_of, gathered, joined_processes
from eval_tasks.store import check_out, write_atomically
from eval_tasks.summary import csv_of
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch.budget import budgets
from nc_patch.calibration import calibrate as defaults
from nc_patch.calibration.calibrate import calibrate
from nc_patch.calibration.fit import Fit
from nc_patch.calibration.profile import SPARSE_BELOW, Profile, checked_count, checked_fraction, checked_layers
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.patch import model_shape

_FILES = PROFILE, TABLE, PICTURE = "profile.json", "calibration.csv", "calibration.png"


def run_calibrate(argv: Sequence[str]) -> int:
    """Calibrates a model and writes the profile and its report."""
    arguments = _parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    out = arguments.out
    with joined_processes() as processes:
        check_out(out, _FILES)
        _check_budget(arguments)
        texts = [_part(load_text(name).content, arguments.part) for name in arguments.text]
        loaded = load_chosen_model(arguments, str(device_of(processes, arguments.device)))
        dense = checked_layers(arguments.dense_layers, model_shape(loaded.model)[0])
        gathered(processes, None)  # nothing is measured where one of them cannot
        options = {name: getattr(arguments, name) for name in ("eps", "pieces", "rows", "seed")}
        profile = calibrate(loaded.model, loaded.tokenizer, texts, arguments.lengths, arguments.target, **options)
        profile = replace(profile, model=arguments.model, dense_layers=dense)
        if arguments.fraction is not None:
            profile = profile.at_budget(arguments.fraction, n=arguments.at, dense_below=arguments.dense_below)
        if processes.is_main_process:
            profile.save(out / PROFILE)
            write_atomically(out / TABLE, csv_of(layer_table(profile)).encode())
            write_atomically(out / PICTURE, to_png(profile_figure(profile)))
            print("\n".join(profile_findings(profile, arguments.dense_below)))
            print(f"\nWritten: {', '.join(str(out / name) for name in _FILES)}")
    return 0


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
        f"Half the width of C's 90 % interval: median {np.median((fit.C_high - fit.C_low) / 2):.2f}.",
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
    """Exponents, and shares of the keys attended, by layer and head."""
    fit, longest = shown_fit(profile), profile.lengths[-1]
    seen = np.array([min(longest, window or longest) for window in profile.windows], dtype=float)[:, None]
    attended = 100 * budgets(seen, profile.alpha, profile.C) / seen
    attended[list(profile.dense_layers)] = 100.0
    figure = Figure(figsize=(11, 5), layout="constrained")
    exponents, shares = figure.subplots(1, 2)
    for axis, values, title, norm in (
        (exponents, fit.C, f"exponent C of the keys that hold {100 * (1 - fit.eps):g} % of the mass", Normalize(0, 1)),
        (shares, attended, f"% of the keys attended at {longest:,} tokens, log scale", LogNorm()),
    ):
        image = axis.imshow(values.T, norm=norm, aspect="auto", origin="lower")
        axis.set(title=title, xlabel="layer", ylabel="query head")
        axis.locator_params(integer=True)
        figure.colorbar(image, ax=axis, format="{x:g}").ax.yaxis.set_minor_formatter("{x:g}")
    return figure


def _check_budget(arguments: argparse.Namespace) -> None:
    """Raises EvalError or ProfileError for a budget that is none, before anything is measured."""
    if arguments.fraction is None:
        if arguments.at is None and arguments.dense_below is None:
            return
        raise EvalError("--at and --dense-below say how the budget of --fraction is counted: give that too")
    fraction = checked_fraction("fraction", arguments.fraction)
    ends = arguments.lengths if arguments.at is None else [checked_count("n", arguments.at)]
    below = NCConfig(1.0).dense_below if arguments.dense_below is None else arguments.dense_below
    dense = [min(n, checked_count("dense_below", below, least=0)) for n in ends]
    least = sum(n * (n + 1) for n in dense) / max(1, sum(n * (n + 1) for n in ends))
    if fraction < least:
        raise EvalError(
            f"queries that see at most {below:,} keys attend {least:.3g} of all keys, and --fraction is {fraction:g}: "
            "give a larger one, a longer --at or a smaller --dense-below"
        )


def _part(content: str, part: str) -> str:
    middle = len(content) // 2
    return {"all": content, "first": content[:middle], "second": content[middle:]}[part]


def _parser() -> argparse.ArgumentParser:
    description = "Measure how sparse every head of a model is, and write a profile of budgets."
    parser = argparse.ArgumentParser(prog="nc-patch calibrate", allow_abbrev=False, description=description)
    add = parser.add_argument
    add_out(parser, f"for {PROFILE} and the report")
    add_model_options(parser)
    add("--text", nargs="+", default=[PYTHON_REFERENCE], metavar="TEXT", help=f"each {TEXT_FORMS} (default)")
    halves = "half of each text to read, so that the other is left to test on (default: all)"
    add("--part", choices=["all", "first", "second"], default="all", help=halves)
    add_lengths(parser, defaults.DEFAULT_LENGTHS, "context lengths in tokens")
    shares = f"shares of the mass to leave out (default: {' '.join(map(str, defaults.DEFAULT_EPS))})"
    add("--eps", nargs="+", type=float, default=list(defaults.DEFAULT_EPS), metavar="E", help=shares)
    add("--target", type=float, default=defaults.DEFAULT_TARGET, help="mass of the budgets (default: %(default)g)")
    add("--fraction", type=float, metavar="F", help="budgets for this share of all keys, in place of --target")
    add("--at", type=int, metavar="N", help="context length at which --fraction holds (default: over all lengths)")
    below = f"count the budget of --fraction for rows that attend all of up to N keys (default: {DEFAULT_DENSE_BELOW})"
    add("--dense-below", type=int, metavar="N", help=below)
    add("--dense-layers", nargs="+", type=int, default=[], metavar="LAYER", help="layers that stay dense")
    add("--pieces", type=int, default=defaults.DEFAULT_PIECES, help="pieces of text (default: %(default)s)")
    rows = "rows at each length of each piece (default: %(default)s)"
    add("--rows", type=int, default=defaults.DEFAULT_ROWS, help=rows)
    add("--seed", type=not_negative, default=0, help="of random numbers (default: 0)")
    return parser
