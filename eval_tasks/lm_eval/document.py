"""The lm-eval task ``nc_document``: perplexity along documents, by the position in the context (loss curves).

A document is cut at the context lengths asked for, and each part is scored under all that goes before it: lengths of
1,024, 2,048 and 4,096 give the perplexity of the positions 0 to 1,023, 1,024 to 2,047 and 2,048 to 4,095. Parts that
double in size cost twice one forward pass over the document.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub
from eval_tasks.lm_eval.by_length import ByLengthTask
from eval_tasks.lm_eval.settings import LENGTHS, Settings, read_settings
from eval_tasks.metrics.perplexity_by_position.perplexity_by_position import by_position
from eval_tasks.models import tokenizer_fingerprint
from eval_tasks.synthetic.fitting import TOLERANCE
from eval_tasks.tasks import tokenise
from eval_tasks.texts import PYTHON_REFERENCE, load_text

SAMPLES = 8
# No tokenizer makes fewer tokens of so many characters; saves tokenising whole books.
_CHARACTERS_PER_TOKEN = 12
# Documents looked through for ones that are long enough.
_MOST_ROWS = 2000


class PerplexityByPosition(ByLengthTask):
    """Perplexity of each part of the documents, and of the whole."""

    @property
    def edges(self) -> list[int]:
        """Positions between which the parts lie."""
        return [0, *self.lengths]

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **options: Any) -> list[Instance]:
        """One log-likelihood request per part, under all that goes before it."""
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=("".join(doc["parts"][:index]), part),
                idx=index,
                metadata=options["metadata"],
            )
            for index, part in enumerate(doc["parts"])
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """For every metric the document's whole curve: log-likelihoods, and the tokens that they cover."""
        curve = ([loglikelihood for loglikelihood, _ in results], list(doc["tokens"]))
        return dict.fromkeys(self.aggregation(), curve)

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        """Perplexity of each part over all documents, ``exp(-Σll / Σtokens)``, and of the whole."""
        parts = {f"perplexity_{a}_{b}": partial(self._aggregate, i) for i, (a, b) in enumerate(pairwise(self.edges))}
        return {**parts, "perplexity": partial(self._aggregate, None)}

    def higher_is_better(self) -> dict[str, bool]:
        """Every metric is better when lower."""
        return dict.fromkeys(self.aggregation(), False)

    def _aggregate(self, part: int | None, curves: Sequence[tuple[list[float], list[int]]]) -> float:
        # Parts end at the last word before an edge, so a part can begin that much before its own.
        tolerance = max(1, int(TOLERANCE * self.lengths[-1]))
        found = by_position(
            [values for values, _ in curves],
            [tokens for _, tokens in curves],
            edges=self.edges,
            tolerance=tolerance,
        )
        value: float = found["overall"] if part is None else found["perplexity"][part]
        return value


def documents(
    *,
    lengths: Sequence[int] | int | None = None,
    max_seq_lengths: Sequence[int] | int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    text: str = PYTHON_REFERENCE,
    **model: Any,
) -> dict[str, Dataset]:
    """The documents of ``nc_document``; its arguments are lm-eval's ``--metadata``, merged with ``--model_args``.

    Args:
        lengths: where documents are cut, in tokens of the model's tokenizer; the last is how much of each is read. By
            default those of 512, 1024, 2048 and 4096 that the model has positions for.
        max_seq_lengths: the same under the name that lm-eval's own tasks have for it.
        samples: how many documents.
        seed: of their choice.
        text: where they come from, as ``eval_tasks.texts.load_text`` says; stretches of one text that do not overlap.
        model: the model's arguments: ``tokenizer`` or ``pretrained`` names the tokenizer.

    Returns:
        ``{"test": Dataset}``, one row per document.

    Raises:
        EvalError: no tokenizer is named, a setting is out of range, or the text is too short.
    """
    settings = read_settings(
        "nc_document", LENGTHS, samples, lengths=lengths, max_seq_lengths=max_seq_lengths, seed=seed, model=model
    )
    source = load_text(text)
    tokens = tokenise(settings.tokenizer, source.content)
    size = settings.lengths[-1] + 1
    slots = len(tokens.ids) // size
    if slots < samples:
        raise EvalError(
            f"the text has {len(tokens.ids):,} tokens; {samples} documents of {size - 1:,} tokens need"
            f" {samples * size:,}. Ask for fewer samples or shorter lengths, or give more text (text in --metadata)."
        )
    content = source.content.encode("utf-8")
    chosen = np.random.default_rng(seed).permutation(slots)[:samples]
    starts = [int(tokens.byte_ends[slot * size - 1]) if slot else 0 for slot in chosen]
    pieces = (content[start : start + _CHARACTERS_PER_TOKEN * size].decode("utf-8", "ignore") for start in starts)
    return _rows((_from_a_word_on(piece) for piece in pieces), settings, source.origin, source.sha256)


def hub_documents(task: str, name: str, **load: Any) -> Callable[..., dict[str, Dataset]]:
    """``documents`` for a data set of the hub: the starts of its first documents that are long enough.

    Args:
        task: named in errors.
        name: of the data set; its column ``text`` is read.
        load: further arguments of ``datasets.load_dataset``.
    """

    def read(
        *,
        lengths: Sequence[int] | int | None = None,
        max_seq_lengths: Sequence[int] | int | None = None,
        samples: int = SAMPLES,
        seed: int = 0,
        hub_copies: str | None = None,
        **model: Any,
    ) -> dict[str, Dataset]:
        settings = read_settings(
            task, LENGTHS, samples, lengths=lengths, max_seq_lengths=max_seq_lengths, seed=seed, model=model
        )
        found = load_hub(name, copies=hub_copies, **load)
        texts = _long_enough(islice(found, _MOST_ROWS), settings, name)
        return _rows(texts, settings, f"the data set {name}", "")

    return read


# The books of PG-19's test split as parquet; the data set `deepmind/pg19` itself is a script, which datasets 5 refuses.
pg19 = hub_documents("nc_pg19", "emozilla/pg19-test", split="test")
# The test split of proof-pile as one JSON file; `hoskinson-center/proof-pile` is a script too.
proof_pile = hub_documents(
    "nc_proof_pile", "dwzhu/PoSE-Datasets", data_files="proof-pile/test.jsonl", split="train", streaming=True
)


def _long_enough(rows: Iterable[Mapping[str, Any]], settings: Settings, name: str) -> list[str]:
    texts: list[str] = []
    longest = 0
    for row in rows:
        if "text" not in row:
            raise EvalError(f"the data set {name} has no column 'text'; it has {', '.join(sorted(row))}")
        text = row["text"][: _CHARACTERS_PER_TOKEN * settings.lengths[-1]].strip()
        # Most tokens have more than a character, so short documents need no tokenising.
        if len(text) > settings.lengths[-1]:
            tokens = len(settings.encode(text))
            longest = max(longest, tokens)
            if tokens >= settings.lengths[-1]:
                texts.append(text)
        if len(texts) == settings.samples:
            return texts
    raise EvalError(
        f"the data set {name} has {len(texts)} documents of {settings.lengths[-1]:,} tokens or more among its first"
        f" {_MOST_ROWS}, and {settings.samples} are asked for (the longest has {longest:,}); ask for fewer samples or"
        " shorter lengths"
    )


def _rows(texts: Iterable[str], settings: Settings, origin: str, sha256: str) -> dict[str, Dataset]:
    shared = {
        "lengths": list(settings.lengths),
        "text_origin": origin,
        "text_sha256": sha256,
        "tokenizer": tokenizer_fingerprint(settings.tokenizer),
    }
    return {"test": Dataset.from_list([_cut(text, settings) | shared for text in texts])}


def _from_a_word_on(text: str) -> str:
    """The text without what is left of a word that was cut before."""
    match = re.search(r"\s", text)
    return text[match.start() :].lstrip() if match else text


def _cut(text: str, settings: Settings) -> dict[str, Any]:
    """A document's parts, which end at the last word before each length, and the tokens of each."""
    text = text[: _CHARACTERS_PER_TOKEN * settings.lengths[-1]]
    content = text.encode("utf-8")
    tokens = tokenise(settings.tokenizer, text)
    inner = (match.start() for match in re.finditer(rb"\s+(?=\S)", content) if match.start())
    borders = [0, *inner, len(content)]
    # Special tokens are read, and none is scored.
    special = len(settings.encode("a")) - len(settings.tokenizer.encode("a", add_special_tokens=False))
    parts: list[str] = []
    counts: list[int] = []
    begin = 0
    for length in settings.lengths:
        last = tokens.byte_ends[min(length - special, len(tokens.ids)) - 1]
        border = bisect_right(borders, last) - 1
        while (total := len(settings.encode(content[: borders[border]].decode()))) > length and border:
            border -= 1
        end = borders[border]
        if not (1 - TOLERANCE) * length <= total <= length:
            raise EvalError(
                f"a document cannot be cut at {length} tokens: its words end at {total}. Give a text with words, or"
                " other lengths"
            )
        parts.append(content[begin:end].decode())
        counts.append(total - special - sum(counts))
        begin = end
    return {"parts": parts, "tokens": counts}
