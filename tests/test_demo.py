"""``nc-patch demo``: what it says of two answers, and one real run."""

import math

import pytest

from eval_tasks.demo import Answer, comparison
from nc_patch import NCConfig
from nc_patch.cli import main

DENSE = Answer("marigold", 10.0, 0.2, 2.0)


@pytest.mark.parametrize(
    ("sparse", "tokens", "advice"),
    [
        (Answer("marigold", 6.0, 0.15, 2.0, (0.2, 0.1)), 6000, "patch_model(model, alpha=12, C=0.5)"),
        (Answer("rose", 6.0, 0.15, 2.0 + math.log(1.1), (0.2, 0.1)), 6000, "nc-patch demo --alpha 24"),
        (Answer("marigold", 11.0, 0.3, 2.0, (0.9, 0.8)), 6000, "dense attention"),
        (Answer("marigold", 10.0, 0.2, 2.0), 900, "a prompt of more than 1,024 tokens"),
    ],
)
def test_the_comparison_says_what_to_do(sparse, tokens, advice):
    time, keys, perplexity, suggestion = comparison(DENSE, sparse, tokens, NCConfig(12.0, 0.5, dense_below=1024))
    assert f"prompt {sparse.first / 10:.2f}, each further token {sparse.step / 0.2:.2f}" in time
    assert f"{sparse.shares[0]:.0%} by the prompt, {sparse.shares[1]:.0%} by the answer, at alpha=12, C=0.5" in keys
    assert f"{math.exp(sparse.nats - 2.0):.3f} times" in perplexity
    assert advice in suggestion


@pytest.mark.slow
def test_a_real_model_answers_twice(capsys):
    assert main(["demo", "--tokens", "1300", "--answer-tokens", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("s to the first token") == 2
    assert said.count("ms a token") == 2
    shares = said.split("keys read")[1].split("by the prompt")[0]
    assert 20 < int(shares.strip().removesuffix("%")) < 100
    assert "perplexity" in said.split("keys read")[1]
