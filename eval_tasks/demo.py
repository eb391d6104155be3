"""``nc-patch demo``: a question about a long prompt, answered with dense and with sparse attention, and their times.

The prompt is a text with a fact in its middle, unless a question of one's own is asked about a text of one's own. The
perplexity is that of the end of the prompt, which both have to read anyway.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from eval_tasks.arguments import add_model_options, load_chosen_model, positive
from eval_tasks.errors import EvalError
from eval_tasks.measure import end_tokens, forward
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch import NCConfig, nc_stats, patched, reset_stats
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

FACT = "The secret word of the lighthouse keeper is marigold."
QUESTION = "What is the secret word of the lighthouse keeper?"
SCORED = 256  # tokens at the end of the prompt whose loss is compared
GOOD = 1.02  # ratio of perplexities up to which a setting is recommended as it is


@dataclass
class Answer:
    """What one way of attention made of the prompt."""

    text: str = ""
    first: float = 0.0  # seconds to the first token
    step: float = math.nan  # median seconds of each further one
    nats: float = 0.0  # mean loss of the prompt's last tokens
    shares: tuple[float, float] = (1.0, 1.0)  # of the keys attended by the prompt, and by the steps


def run_demo(argv: Sequence[str]) -> int:
    """Prints both answers and the comparison."""
    given = _parser().parse_args(argv)
    try:
        config = NCConfig(given.alpha, given.C)
    except ValueError as error:
        raise EvalError(str(error)) from error
    content = load_text(given.text).content
    loaded = load_chosen_model(given)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = prompt_of(tokenizer, content, given.tokens, given.question).to(model.device)
    where = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else str(model.device)
    print(f"{given.model}, a prompt of {prompt.shape[1]:,} tokens of {given.text}, on {where}")
    print(f"Question: {given.question or QUESTION}\n")
    for each in (None, config):  # what compiles and loads on first use is not timed
        with contextlib.redirect_stdout(None):
            answer(model, tokenizer, prompt[:, : config.dense_below + 64], each, 2)
    dense, sparse = (answer(model, tokenizer, prompt, each, given.answer_tokens) for each in (None, config))
    print("\n".join(["", *comparison(dense, sparse, prompt.shape[1], config)]))
    return 0


def prompt_of(tokenizer: Any, text: str, tokens: int, question: str | None) -> torch.Tensor:
    """Token ids ``[1, N]``: ``tokens`` of a text, with a fact in its middle if nothing is asked, and a question."""
    ids = tokenizer(text[: tokens * 12], add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise EvalError(f"the text has {len(ids):,} tokens, and --tokens asks for {tokens:,}: give fewer, or more text")
    halves = (tokenizer.decode(part) for part in (ids[: tokens // 2], ids[tokens // 2 : tokens]))
    asked = f"{(f' {FACT} ' if question is None else '').join(halves)}\n\n{question or QUESTION}"
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": asked}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return tokenizer.apply_chat_template(message, **options)["input_ids"]
    return tokenizer(f"{asked}\nAnswer:", return_tensors="pt").input_ids


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: torch.Tensor, config: NCConfig | None, most: int) -> Answer:
    """The greedy answer of at most ``most`` tokens to ``prompt`` ``[1, N]``, printed as it comes; None is dense."""
    found, cache, ends = Answer(), DynamicCache(config=model.config), end_tokens(model, tokenizer)
    taken, seconds = list[int](), list[float]()
    with patched(model, config=config) if config else contextlib.nullcontext():
        begin, ids = time.perf_counter(), prompt[0]
        scored = min(SCORED, len(ids) - 1)
        logits = forward(model, ids, scored + 1, cache, len(ids)).float()
        token = int(logits[-1].argmax())
        found.first = time.perf_counter() - begin
        found.nats = torch.nn.functional.cross_entropy(logits[:-1], ids[-scored:]).item()
        share = nc_stats(model)["attended_fraction"] if config else 1.0
        if config:
            reset_stats(model)
        print(f"{'sparse' if config else 'dense':7} {found.first:6.2f} s to the first token: ", end="", flush=True)
        while token not in ends and len(taken) < most:
            taken.append(token)
            text = tokenizer.decode(taken)
            print(text[len(found.text) :], end="", flush=True)
            found.text, begin = text, time.perf_counter()
            ids = torch.cat([ids, ids.new_tensor([token])])
            token = int(forward(model, ids, 1, cache).argmax())
            seconds.append(time.perf_counter() - begin)
        found.step = statistics.median(seconds) if seconds else math.nan
        if config:
            found.shares = (share, nc_stats(model)["attended_fraction"] if seconds else math.nan)
    print(f"   ({found.step * 1e3:.0f} ms a token)", flush=True)
    return found


def comparison(dense: Answer, sparse: Answer, tokens: int, config: NCConfig) -> list[str]:
    """Lines that say what sparse attention saves, what it costs, and what to do."""
    prompt, step = sparse.first / dense.first, sparse.step / dense.step
    quality, ((alpha, C),) = math.exp(sparse.nats - dense.nats), config.laws(0)
    if tokens <= config.dense_below:
        advice = f"a prompt of more than {config.dense_below:,} tokens: a shorter one attends every key."
    elif quality > GOOD:
        advice = f"nc-patch demo --alpha {2 * alpha:g}, as this budget costs {quality - 1:.1%} of perplexity"
    elif min(prompt, step) > 1:
        advice = "dense attention: at this length sparse attention saves no time."
    else:
        advice = f"patch_model(model, alpha={alpha:g}, C={C:g})"
    shares = f"{sparse.shares[0]:.0%} by the prompt, {sparse.shares[1]:.0%} by the answer"
    return [
        f"time        prompt {prompt:.2f}, each further token {step:.2f} of dense attention's",
        f"keys read   {shares}, at alpha={alpha:g}, C={C:g}",
        f"perplexity  {quality:.3f} times dense attention's, over the last {SCORED} tokens of the prompt",
        f"suggestion  {advice}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nc-patch demo", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add_model_options(parser)
    add("--text", default=PYTHON_REFERENCE, help="what the prompt is of: a file or a known name")
    add("--tokens", type=positive, default=6000, help="of the text (default: 6000)")
    add("--question", help="about the text; by default one about a fact that is hidden in it")
    add("--answer-tokens", type=positive, default=32, help="at most (default: 32)")
    add("--alpha", type=float, default=DEFAULT_ALPHA, help=f"of the budget (default: {DEFAULT_ALPHA:g})")
    add("--C", type=float, default=DEFAULT_C, help=f"of the budget (default: {DEFAULT_C:g})")
    return parser
