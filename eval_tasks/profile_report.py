"""The report of a calibration: one page of HTML that refers to nothing outside itself, and its plots as a PNG."""

import html
from pathlib import Path

import numpy as np

from eval_tasks.figures import to_png, to_svg
from eval_tasks.profile_figures import profile_figure, profile_figures, shown_fit
from eval_tasks.report import PAGE
from eval_tasks.store import write_atomically
from eval_tasks.tables import Table
from nc_patch.calibration.profile import SPARSE_BELOW, Profile

PROFILE, PROFILE_REPORT, PROFILE_PICTURE = "profile.json", "calibration.html", "calibration.png"
# Heads of the table: more make the page hard to read, and the file has them all.
_HEADS_LISTED = 40


def write_profile_report(profile: Profile, directory: Path, command: str) -> list[str]:
    """Writes the page and the picture into a directory; returns the findings as sentences.

    Raises:
        EvalError: the directory cannot be written.
    """
    sentences = profile_findings(profile)
    write_atomically(directory / PROFILE_PICTURE, to_png(profile_figure(profile)))
    parts = [
        f'<p class="lead">{_escape(" ".join(sentences[:2]))}</p>',
        f"<ul>{''.join(f'<li>{_escape(sentence)}</li>' for sentence in sentences[2:])}</ul>",
        *(_figure(to_svg(figure, name), caption) for name, caption, figure in profile_figures(profile)),
        *(table.to_html() for table in (layer_table(profile), sparse_table(profile))),
        setup_table(profile).to_html(),
        "<h2>Measure it again</h2>",
        f"<pre>{_escape(command)}</pre>",
    ]
    content = PAGE.substitute(title=_escape(f"How sparse attention is: {profile.model}"), sections="\n".join(parts))
    write_atomically(directory / PROFILE_REPORT, content.encode())
    return sentences


def profile_findings(profile: Profile) -> list[str]:
    """What calibration found, as sentences."""
    fit, longest = shown_fit(profile), profile.lengths[-1]
    by_layer = np.median(fit.C, 1)
    low, high = int(by_layer.argmin()), int(by_layer.argmax())
    share = fit.support[-1] / profile.visible[-1][:, None]
    dense = np.argwhere(~profile.is_sparse())
    sentences = [
        f"At {longest:,} tokens the median head holds {100 * (1 - fit.eps):g} % of its mass in "
        f"{100 * np.median(share):.2g} % of the keys.",
        f"The exponent C runs from {by_layer[low]:.2f} in layer {low} to {by_layer[high]:.2f} in layer {high} (median "
        f"over heads); over all heads its median is {np.median(fit.C):.2f}.",
        f"The laws of this profile are for {profile.aim}; at {longest:,} tokens they are predicted to keep "
        f"{100 * float(np.mean(profile.kept_mass(longest)[0])):.1f} % of the mass, averaged over heads.",
        f"R² of the fits: median {np.median(fit.r2):.2f}; it is low where C is near 0, because there is little to "
        f"explain. Half the width of C's 90 % interval: median {np.median((fit.C_high - fit.C_low) / 2):.2f}.",
    ]
    if len(dense):
        layers = sorted({int(layer) for layer, _ in dense})
        sentences.append(
            f"{len(dense)} of {fit.C.size} heads are not sparse: they need {100 * SPARSE_BELOW:g} % of the keys or "
            f"more (layers {', '.join(map(str, layers))})."
        )
    else:
        sentences.append(f"Every head is sparse: it needs less than {100 * SPARSE_BELOW:g} % of the keys.")
    if profile.pieces == 1:
        sentences.append("One piece of text was read, so the intervals say nothing about other texts.")
    return sentences


def layer_table(profile: Profile) -> Table:
    """Exponents, keys and sensitivity, layer by layer."""
    fit = shown_fit(profile)
    rows = []
    for layer in range(profile.shape[0]):
        C, share = fit.C[layer], fit.support[-1, layer] / profile.visible[-1, layer]
        rows.append(
            (
                str(layer),
                f"{np.median(C):.2f}",
                f"{C.min():.2f} – {C.max():.2f}",
                f"{100 * np.median(share):.1f} %",
                f"{profile.sensitivity[layer].mean():.3g}",
                f"{np.median(profile.alpha[layer]):.3g} · n^{np.median(profile.C[layer]):.2f}",
                "dense" if layer in profile.dense_layers else "",
            )
        )
    return Table(
        "Layer by layer",
        "Sensitivity is the loss, in nats per token, that an error of unit norm in a head's output adds. The law is "
        "the median over heads.",
        ("Layer", "C, median", "C, range", f"Keys for {100 * (1 - fit.eps):g} %", "Sensitivity", "Law in force", ""),
        tuple(rows),
    )


def sparse_table(profile: Profile) -> Table:
    """The heads that need the largest share of the keys."""
    fit = shown_fit(profile)
    share = fit.support[-1] / profile.visible[-1][:, None]
    order = np.argsort(-share, axis=None, kind="stable")[:_HEADS_LISTED]
    rows = []
    for layer, head in zip(*np.unravel_index(order, share.shape), strict=True):
        rows.append(
            (
                f"{layer}, {head}",
                f"{100 * share[layer, head]:.0f} %",
                f"{fit.C[layer, head]:.2f}",
                f"{fit.C_low[layer, head]:.2f} – {fit.C_high[layer, head]:.2f}",
                f"{fit.r2[layer, head]:.2f}",
                "" if share[layer, head] < SPARSE_BELOW else "not sparse",
            )
        )
    return Table(
        "The heads that need most keys",
        f"Up to {_HEADS_LISTED} of them; {PROFILE} has all.",
        ("Layer, head", f"Keys for {100 * (1 - fit.eps):g} %", "C", "90 % interval", "R²", ""),
        tuple(rows),
    )


def setup_table(profile: Profile) -> Table:
    """What was measured on what."""
    rows = (
        ("Model", f"{profile.model} ({profile.model_class}), weights {profile.fingerprint}"),
        ("Lengths", ", ".join(f"{n:,}" for n in profile.lengths)),
        ("Text", f"{profile.pieces} pieces, SHA-256 of their tokens {profile.texts}"),
        ("Shares of the mass", ", ".join(f"{100 * (1 - fit.eps):g} %" for fit in profile.fits)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in profile.versions.items())),
    )
    return Table("What was measured", "", ("", ""), rows)


def _figure(svg: str, caption: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{_escape(caption)}" ', 1)
    return f"<figure>{labelled}<figcaption>{_escape(caption)}</figcaption></figure>"


def _escape(value: object) -> str:
    return html.escape(str(value))
