"""The table of families in ``docs/families.md``, made from what the suite finds."""

from pathlib import Path

import transformers
from family_suite import Outcome

TABLE = Path(__file__).parents[2] / "docs" / "families.md"

_INTRODUCTION = """\
# Families

Every causal language model of `transformers` {version}, built tiny from its config and put through one suite; written
by `python scripts/family_table.py`. **{supported} supported, {refused} refused, {not_built} not built here.**

A supported family gives with a full budget the logits of its own dense attention to 2e-5, for `topk`, `window`,
`block` and `dense`: a prompt, left-padded batches, packed sequences, a prompt in pieces, token by token, and generation
from a left-padded batch. With a small budget `topk` and `window` give the same alone, in a padded batch, packed, in
pieces, and token by token. Unpatched, it gives bit for bit what it gave before.

*As dense* means that the dense model itself does not give the same that way (for example, layers of linear attention
carry their state from one packed sequence into the next); the patched one gives what the dense one gives. *Unlike when
dense* means that packed sequences see each other when the model is dense, and are kept apart when it is patched; *in
attention layers alone*, that its other layers do carry their state over. *Not when dense either* names what the dense
model raises there.

"""


def row(outcome: Outcome) -> str:
    """The line of the table for one family."""
    if outcome.not_built is not None:
        cells = [outcome.name, outcome.class_name, outcome.not_built]
    elif outcome.refused is not None:
        reason = outcome.refused.replace("\n", " ").replace("|", "\\|")
        cells = [outcome.name, outcome.class_name, str(outcome.refused_at), reason]
    else:
        dense = "; ".join(outcome.dense)
        cells = [outcome.name, outcome.class_name, outcome.prefill, outcome.decode, outcome.packed, dense]
    cells[0] = cells[0].split(" ")[0]
    return f"| {' | '.join(cells)} |"


def table(outcomes: list[Outcome]) -> str:
    """The whole page; raises ValueError where something was found to be wrong."""
    wrong = [f"{outcome.name}: {'; '.join(outcome.wrong)}" for outcome in outcomes if outcome.wrong]
    if wrong:
        raise ValueError(f"no table is written while families are wrong: {' '.join(wrong)}")
    not_built = [outcome for outcome in outcomes if outcome.not_built is not None]
    refused = [outcome for outcome in outcomes if outcome.refused is not None]
    supported = [outcome for outcome in outcomes if outcome not in not_built and outcome not in refused]
    parts = [
        _INTRODUCTION.format(
            version=transformers.__version__,
            supported=len(supported),
            refused=len(refused),
            not_built=len(not_built),
        )
    ]
    for title, columns, group in (
        ("Supported", ("family", "class", "prefill", "decode", "packed", "left as it is, and why"), supported),
        ("Refused", ("family", "class", "when", "reason"), refused),
        ("Not built here", ("family", "class", "reason"), not_built),
    ):
        parts.append(f"## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
        parts.append("".join(f"{row(outcome)}\n" for outcome in group) + "\n")
    return "".join(parts).rstrip() + "\n"
