"""RULER's question answering (arXiv 2404.06654, section 3): the documents of a question among many others.

Questions and documents are those of SQuAD 2.0 and HotpotQA (distractor setting), loaded from the hub or a copy of it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub
from eval_tasks.synthetic.sample import Draft, Generator, Recipe, Request

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_TEMPLATE = (
    f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{_INSTRUCTION}\n\nQuestion: {{question}}"
)


@dataclass(frozen=True)
class _Question:
    question: str
    answers: tuple[str, ...]
    evidence: tuple[int, ...]  # documents that hold the answer
    related: tuple[int, ...]  # documents of the same subject


@dataclass(frozen=True)
class _Collection:
    documents: tuple[str, ...]
    questions: tuple[_Question, ...]


@lru_cache(maxsize=2)
def _squad(copies: str | None) -> _Collection:
    rows = load_hub("rajpurkar/squad_v2", copies=copies, split="validation")
    numbers = {context: i for i, context in enumerate(sorted(set(rows["context"])))}
    of_title: dict[str, dict[int, None]] = {}
    for title, context in zip(rows["title"], rows["context"], strict=True):
        of_title.setdefault(title, {})[numbers[context]] = None
    questions = []
    for row in rows:
        if answers := tuple(dict.fromkeys(row["answers"]["text"])):
            own = numbers[row["context"]]
            related = tuple(i for i in of_title[row["title"]] if i != own)
            questions.append(_Question(row["question"], answers, (own,), related))
    return _Collection(tuple(numbers), tuple(questions))


@lru_cache(maxsize=2)
def _hotpotqa(copies: str | None) -> _Collection:
    rows = load_hub("hotpotqa/hotpot_qa", "distractor", copies=copies, split="validation")
    numbers: dict[str, int] = {}
    questions = []
    for row in rows:
        context = row["context"]
        documents = {
            title: numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
            for title, sentences in zip(context["title"], context["sentences"], strict=True)
        }
        named = dict.fromkeys(row["supporting_facts"]["title"])
        evidence = tuple(documents[title] for title in named if title in documents)
        related = tuple(i for title, i in documents.items() if title not in named)
        questions.append(_Question(row["question"], (row["answer"],), evidence, related))
    return _Collection(tuple(numbers), tuple(questions))


def _recipe(request: Request, collection: _Collection) -> Recipe:
    if not collection.questions:
        raise EvalError(f"{request.key} has no question with an answer in its data; check the copy of the data set")
    # One order of questions for a seed, so that samples of several indices differ.
    order = list(range(len(collection.questions)))
    Request(request.length, request.seed, 0, request.material, request.key).random("questions").shuffle(order)
    asked = collection.questions[order[request.index % len(order)]]
    draw = request.random("documents")
    related = list(asked.related)
    draw.shuffle(related)
    known = {*asked.evidence, *asked.related}
    others = [i for i in range(len(collection.documents)) if i not in known]
    draw.shuffle(others)
    words = [collection.documents[i].split(" ") for i in [*related, *others]]
    ends = [0]
    for document in words:
        ends.append(ends[-1] + len(document))
    places = sorted(draw.random() for _ in asked.evidence)

    def build(units: int, padding: int) -> Draft:
        # As many distractors as fit; the last one is cut to the word.
        documents = []
        for document, begin in zip(words, ends, strict=False):
            if begin >= units:
                break
            documents.append(" ".join(document[: units - begin]))
        for number, place in zip(asked.evidence, places, strict=True):
            documents.insert(int(place * (len(documents) + 1)), collection.documents[number])
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        evidence = tuple(collection.documents[number] for number in asked.evidence)
        return Draft(_TEMPLATE.format(context=context, question=asked.question), "Answer:", evidence)

    return Recipe(build, asked.answers, largest=ends[-1])


def _from_squad(request: Request) -> Recipe:
    return _recipe(request, _squad(request.material.hub_copies))


def _from_hotpotqa(request: Request) -> Recipe:
    return _recipe(request, _hotpotqa(request.material.hub_copies))


_WHAT: dict[str, Any] = {"qa_squad": _from_squad, "qa_hotpot": _from_hotpotqa}
_DATA = {"qa_squad": "SQuAD 2.0", "qa_hotpot": "HotpotQA"}

QA_GENERATORS: tuple[Generator, ...] = tuple(
    Generator(
        name,
        f"a question of {_DATA[name]} and its documents among others; needs the hub, or a copy of the data set",
        recipe,
        new_tokens=32,
        match="part",
    )
    for name, recipe in _WHAT.items()
)
