"""``dense_below``: every function that gives budgets gives the same, those of a loop in float64."""

import math
import random

import numpy as np
import pytest
import torch

from nc_patch import NCConfig
from nc_patch.budget import budget_of, budgets, budgets_for, law_values, row_budgets

LAWS = [(2.0, 0.5), (4.0, 0.6), (0.5, 1.0), (1.0, 1.0), (100.0, 0.0), (3.0, 1 / 3), (1e6, 0.7), (1e-3, 0.3)]


def by_hand(n: int, alpha: float, C: float, min_keys: int, dense_below: int) -> int:
    """The law as its description has it."""
    return n if n <= dense_below else min(n, max(min_keys, math.ceil(alpha * float(n) ** C)))


@pytest.mark.parametrize("dense_below", [0, 1, 63, 1024, 10**6])
@pytest.mark.parametrize("min_keys", [1, 50])
def test_all_ways_to_a_budget_agree(dense_below, min_keys):
    draw = random.Random(dense_below)
    edges = [n for n in range(dense_below - 2, dense_below + 3) if n >= 0]
    n = torch.tensor([*range(90), 1023, 1024, 1025, *edges, 2**20, *(draw.randrange(2**20) for _ in range(200))])
    visible = torch.stack((torch.full_like(n, 5), n + 5), -1)[None].int()
    alphas, exponents = map(list, zip(*LAWS, strict=True))
    of_rows = row_budgets(visible, int(n.max()), alphas, exponents, min_keys, dense_below)
    by_head = NCConfig([alphas], [exponents], min_keys=min_keys, dense_below=dense_below)
    assert torch.equal(by_head.row_budgets(visible, int(n.max()), 0), of_rows)
    for head, (alpha, C) in enumerate(LAWS):
        law = (alpha, C, min_keys, dense_below)
        expected = [by_hand(i, *law) for i in n.tolist()]
        assert [budget_of(i, *law) for i in n.tolist()] == expected, law
        assert budgets(n.numpy(), *law).tolist() == expected, law
        assert of_rows[0, head].tolist() == expected, law
        config = NCConfig(alpha, C, min_keys=min_keys, dense_below=dense_below)
        assert config.budget(n).tolist() == expected, law
        assert [config.budget(i) for i in n.tolist()] == expected, law
        assert by_head.budget(n, 0, head).tolist() == expected, law
        assert config.row_budgets(visible, int(n.max()))[0, 0].tolist() == expected, law
        raw = law_values(n.numpy(), alpha, C)
        sure = (np.abs(raw - np.rint(raw)) > 1e-9 * raw) | (n.numpy() <= dense_below)
        assert (budgets_for(n.numpy(), *law) == expected)[sure].all(), law


@pytest.mark.parametrize("dense_below", [0, 1, 63, 200, 1000])
def test_the_largest_budget_is_that_of_the_most_expensive_length(dense_below):
    config = NCConfig([[2.0, 9.0], [1.0, 1.5]], [[0.5, 0.1], [0.3, 0.6]], dense_below=dense_below)
    for layer in range(2):
        found = [max(int(config.budget(n, layer, head)) for head in range(2)) for n in range(400)]
        for n in (1, 2, 30, 62, 63, 64, 65, 150, 199, 200, 201, 399):
            assert config.largest_budget(n, layer) == max(found[: n + 1])
