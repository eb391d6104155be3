"""What ``nc_stats`` returns: a dictionary that prints as a table."""

from typing import Any

from nc_patch.mass_counts import PHASES

_COLUMNS = ("layer", "calls", "keys", "share", *(f"mass, {phase}" for phase in PHASES), "ran dense")


class PatchStats(dict[str, Any]):
    """The dictionary of ``nc_stats``; ``print`` shows a line for the model and one for each layer.

    A kept mass that is estimated, and not certain, has ``~`` before it.
    """

    def __str__(self) -> str:
        layers = [_line(layer) for layer in self["layers"]]
        rows = [_COLUMNS, ("all", str(sum(layer["calls"] for layer in self["layers"])), *_figures(self), ""), *layers]
        # Columns in which nothing was counted say nothing.
        kept = [at for at in range(len(_COLUMNS)) if any(row[at].strip("-") for row in rows[1:])]
        widths = {at: max(len(row[at]) for row in rows) for at in kept}
        pad = lambda at, text: text if _COLUMNS[at] == "ran dense" else text.rjust(widths[at])  # noqa: E731
        lines = ["  ".join(pad(at, row[at]) for at in kept) for row in rows]
        lines += [f"left dense: {part['kind']} ({len(part['names'])}): {part['reason']}" for part in self["left_dense"]]
        return "\n".join(line.rstrip() for line in lines)


def _line(layer: dict[str, Any]) -> tuple[str, ...]:
    dense = "; ".join(f"{count} of them: {reason}" for reason, count in layer["dense_calls"].items())
    return str(layer["layer"]), str(layer["calls"]), *_figures(layer), dense


def _figures(counts: dict[str, Any]) -> tuple[str, ...]:
    keys, share = counts["mean_keys"], counts["attended_fraction"]
    masses = (counts["kept_mass"][phase] for phase in PHASES)
    return (
        "-" if keys is None else f"{keys:,.1f}",
        "-" if share is None else f"{100 * share:.1f} %",
        *("-" if mass is None else f"{'' if mass['certified'] else '~'}{mass['mean']:.4f}" for mass in masses),
    )
