"""Tasks generated at any context length, without a network: RULER's and the passkey.

``synthesize(GENERATORS["niah_single_2"], tokenizer, length, seed, index)`` is a pure function of its arguments.
"""

from eval_tasks.synthetic.counting import COUNTING_GENERATORS
from eval_tasks.synthetic.needles import NEEDLE_GENERATORS
from eval_tasks.synthetic.sample import Generator, SyntheticSample, chat, synthesize

GENERATORS: dict[str, Generator] = {one.name: one for one in (*NEEDLE_GENERATORS, *COUNTING_GENERATORS)}

__all__ = ["GENERATORS", "Generator", "SyntheticSample", "chat", "synthesize"]
