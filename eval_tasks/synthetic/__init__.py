"""Tasks generated at any context length, without a network: RULER's and the passkey.

``synthesize(GENERATORS["niah_single_2"], tokenizer, length, seed, index)`` is a pure function of its arguments.
"""

from eval_tasks.synthetic.ruler import GENERATORS
from eval_tasks.synthetic.sample import Generator, SyntheticSample, chat, synthesize

__all__ = ["GENERATORS", "Generator", "SyntheticSample", "chat", "synthesize"]
