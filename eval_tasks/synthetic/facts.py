"""Facts in a haystack after BABILong (arXiv 2406.10149): the first five bAbI tasks (arXiv 1502.05698), in prose.

Stories are simulated here, not taken from bAbI: people walk, take, drop and give, and the state gives the answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from eval_tasks.synthetic.needles import insert
from eval_tasks.synthetic.sample import Draft, Generator, Recipe, Request

_PEOPLE = ("Mary", "John", "Daniel", "Sandra")
_GIVERS = ("Mary", "Fred", "Bill", "Jeff")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")
_WALK = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TAKE = ("got", "took", "picked up", "grabbed")
_DROP = ("dropped", "left", "put down", "discarded")
_GIVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
# Below this length the examples would take up to a third.
_SHORTEST_WITH_EXAMPLES = 1024


@dataclass(frozen=True)
class _Story:
    facts: tuple[str, ...]
    question: str
    answer: str
    evidence: tuple[str, ...]


@dataclass
class _World:
    """People and things that move, and the sentences that say so; no sentence is said twice."""

    draw: random.Random
    people: tuple[str, ...]
    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    moves: dict[str, list[str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)

    def say(self, choices: list[str]) -> str | None:
        """Adds one of the sentences that was not said before and returns it, or None where all were."""
        fresh = [sentence for sentence in choices if sentence not in self.facts]
        if not fresh:
            return None
        self.facts.append(self.draw.choice(fresh))
        return self.facts[-1]

    def walk(self, person: str) -> str | None:
        place = self.draw.choice([place for place in _PLACES if place != self.place.get(person)])
        said = self.say([f"{person} {verb} the {place}." for verb in _WALK])
        if said:
            self.place[person] = place
            self.moves.setdefault(person, []).append(said)
        return said

    def take(self, person: str, thing: str) -> str | None:
        said = self.say([f"{person} {verb} the {thing} there." for verb in _TAKE])
        if said:
            self.holder[thing] = person
        return said


def _one_fact(draw: random.Random) -> _Story:
    world = _World(draw, _PEOPLE)
    for _ in range(draw.choice((2, 4, 6, 8, 10))):
        world.walk(draw.choice(_PEOPLE))
    person = draw.choice(sorted(world.place))
    return _Story(tuple(world.facts), f"Where is {person}?", world.place[person], (world.moves[person][-1],))


def _carried(draw: random.Random, walks: int) -> tuple[_World, str, list[str], list[str]]:
    """A world where someone took a thing and walked with it: (world, thing, sentences that matter, places seen)."""
    world = _World(draw, _PEOPLE)
    carrier, *others = draw.sample(_PEOPLE, len(_PEOPLE))
    thing, other_thing = draw.sample(_THINGS, 2)

    def bustle() -> None:
        for _ in range(draw.randint(0, 2)):
            world.walk(draw.choice(others))
        if draw.random() < 0.3 and other_thing not in world.holder and world.place.get(others[0]):
            world.take(others[0], other_thing)

    bustle()
    world.walk(carrier)
    places = [world.place[carrier]]
    bustle()
    evidence = [world.take(carrier, thing)]
    for _ in range(walks):
        bustle()
        evidence.append(world.walk(carrier))
        places.append(world.place[carrier])
    bustle()
    return world, thing, [sentence for sentence in evidence if sentence], places


def _two_facts(draw: random.Random) -> _Story:
    walks = draw.randint(1, 3)
    world, thing, said, places = _carried(draw, walks)
    evidence = (said[0], said[-1])
    if draw.random() < 0.5:
        carrier = world.holder[thing]
        drop = world.say([f"{carrier} {verb} the {thing} there." for verb in _DROP])
        assert drop is not None  # nothing was dropped before
        # What was dropped stays where it is, wherever its carrier goes.
        evidence = (said[-1], drop)
        world.walk(carrier)
    return _Story(tuple(world.facts), f"Where is the {thing}?", places[-1], evidence)


def _three_facts(draw: random.Random) -> _Story:
    world, thing, said, places = _carried(draw, draw.randint(2, 4))
    last = places[-1]
    # A place that was visited before would leave open which visit is meant.
    if last in places[:-1]:
        return _three_facts(draw)
    question = f"Where was the {thing} before the {last}?"
    return _Story(tuple(world.facts), question, places[-2], (said[0], *said[-2:]))


def _two_arguments(draw: random.Random) -> _Story:
    centre, first, second = draw.sample(_PLACES, 3)
    directions = draw.sample(sorted(_OPPOSITE), 2)
    around = list(zip((first, second), directions, strict=True))
    facts = tuple(f"The {place} is {direction} of the {centre}." for place, direction in around)
    chosen = draw.randrange(2)
    place, direction = around[chosen]
    question = draw.choice(
        (f"What is {direction} of the {centre}?", f"What is the {centre} {_OPPOSITE[direction]} of?")
    )
    return _Story(facts, question, place, (facts[chosen],))


def _three_arguments(draw: random.Random) -> _Story:
    world = _World(draw, _GIVERS)
    pairs = draw.sample([(a, b) for a in _GIVERS for b in _GIVERS if a != b], len(_THINGS))
    gifts = []
    for thing, (giver, receiver) in zip(draw.sample(_THINGS, len(_THINGS)), pairs, strict=True):
        world.walk(draw.choice(_GIVERS))
        world.take(giver, thing)
        world.walk(draw.choice(_GIVERS))
        given = world.say([f"{giver} {verb} the {thing} to {receiver}." for verb in _GIVE])
        assert given is not None  # every thing is given once
        gifts.append((giver, thing, receiver, given))
    giver, thing, receiver, given = draw.choice(gifts)
    question, answer = draw.choice(
        (
            (f"What did {giver} give to {receiver}?", thing),
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who did {giver} give the {thing} to?", receiver),
        )
    )
    return _Story(tuple(world.facts), question, answer, (given,))


@dataclass(frozen=True)
class _FactTask:
    """A kind of story, and the instructions and examples that go before it, as BABILong words them."""

    story: Callable[[random.Random], _Story]
    instructions: str
    examples: tuple[tuple[str, str, str], ...]

    def recipe(self, request: Request) -> Recipe:
        draw = request.random("story")
        shown = "".join(f"{facts}\n{question} {answer}\n\n" for facts, question, answer in self.examples)
        story = self.story(draw)
        # The examples speak of the same people: what they say must not pass for the story.
        while any(fact in shown for fact in story.facts):
            story = self.story(draw)
        depths = sorted(draw.random() for _ in story.facts)
        prose = request.material.prose
        start = request.random("prose").choice(prose.sentence_starts)

        def build(units: int, padding: int) -> Draft:
            context = " ".join(insert(prose.sentences(start, units), list(story.facts), depths))
            opening = shown if request.length >= _SHORTEST_WITH_EXAMPLES else ""
            return Draft(f"{self.instructions}\n\n{opening}{context}\n{story.question}", "", story.evidence)

        return Recipe(build, (story.answer,))


_CARRYING = (
    "with the facts about locations and actions of different persons hidden in some random text and a question. You"
    " need to answer the question based only on the information from the facts. If a person got an item in the first"
    " location and travelled to the second location the item is also in the second location. If a person dropped an"
    " item in the first location and moved to the second location the item remains in the first location.\nAlways"
    " return your answer in the following format:"
)

_TASKS: dict[str, tuple[_FactTask, str, float]] = {
    "babi_qa1": (
        _FactTask(
            _one_fact,
            "I will give you context with the facts about positions of different persons hidden in some random text and"
            " a question. You need to answer the question based only on the information from the facts. If a person was"
            " in different locations, use the latest location to answer the question.\nAlways return your answer in the"
            " following format:\nThe most recent location of 'person' is 'location'. Do not write anything else after"
            " that.",
            (
                (
                    "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony.",
                    "Where is Charlie?",
                    "The most recent location of Charlie is balcony.",
                ),
                (
                    "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to"
                    " balcony.",
                    "Where is Alan?",
                    "The most recent location of Alan is shop.",
                ),
            ),
        ),
        "where a person is, by the last of the sentences about it",
        1 / len(_PLACES),
    ),
    "babi_qa2": (
        _FactTask(
            _two_facts,
            f"I will give you context {_CARRYING}\nThe 'item' is in 'location'. Do not write anything else after that.",
            (
                (
                    "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony.",
                    "Where is the bottle?",
                    "The bottle is in the balcony.",
                ),
                (
                    "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen.",
                    "Where is the screw driver?",
                    "The screw driver is in the kitchen.",
                ),
            ),
        ),
        "where a thing is that someone carried, by two sentences",
        1 / len(_PLACES),
    ),
    "babi_qa3": (
        _FactTask(
            _three_facts,
            f"I give you context {_CARRYING}\nBefore the $location_1$ the $item$ was in the $location_2$. Do not write"
            " anything else after that.",
            (
                (
                    "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel"
                    " journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen.",
                    "Where was the apple before the kitchen?",
                    "Before the kitchen the apple was in the bathroom.",
                ),
                (
                    "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra"
                    " took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom.",
                    "Where was the football before the bedroom?",
                    "Before the bedroom the football was in the garden.",
                ),
            ),
        ),
        "where a thing was before it came where it is, by three sentences",
        1 / len(_PLACES),
    ),
    "babi_qa4": (
        _FactTask(
            _two_arguments,
            "I will give you context with the facts about locations and their relations hidden in some random text and"
            " a question. You need to answer the question based only on the information from the facts.\nYour answer"
            " should contain only one word - location. Do not write anything else after that.",
            (
                (
                    "The hallway is south of the kitchen. The bedroom is north of the kitchen.",
                    "What is the kitchen south of?",
                    "bedroom",
                ),
                (
                    "The garden is west of the bedroom. The bedroom is west of the kitchen.",
                    "What is west of the bedroom?",
                    "garden",
                ),
            ),
        ),
        "which place lies north, south, east or west of another",
        1 / len(_PLACES),
    ),
    "babi_qa5": (
        _FactTask(
            _three_arguments,
            "I will give you context with the facts about different people, their location and actions, hidden in some"
            " random text and a question. You need to answer the question based only on the information from the facts."
            "\nYour answer should contain only one word. Do not write anything else after that. Do not explain your"
            " answer.",
            (
                (
                    "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took"
                    " the milk there.",
                    "Who did Mary give the apple to?",
                    "Fred",
                ),
                (
                    "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff"
                    " went back to the garden.",
                    "What did Fred give to Bill?",
                    "apple",
                ),
            ),
        ),
        "who gave what to whom",
        (1 / len(_THINGS) + 2 / len(_GIVERS)) / 3,
    ),
}

FACT_GENERATORS: tuple[Generator, ...] = tuple(
    Generator(name, f"{what}, in prose", task.recipe, new_tokens=16, chance=chance)
    for name, (task, what, chance) in _TASKS.items()
)
