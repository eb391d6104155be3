"""The table of query blocks against the reference's runs of rows, and what is worked out from it."""

import pytest
import torch
from attention_cases import random_case
from operations import problem_of, problem_of_case

from nc_patch.selections.block import blocks
from nc_patch.selections.block.definition import query_blocks


@pytest.mark.parametrize("query_block_size", [64, 128])
def test_the_table_holds_the_references_query_blocks(query_block_size):
    for seed in range(60):
        case = random_case(seed, longest=300)
        B, Lq = case.origin.shape
        table = blocks.query_block_table(case.visible, case.origin, query_block_size)
        owner = blocks.block_of_rows(table, B, Lq)
        sampled = blocks.sampled_rows(table, case.visible, case.origin, 16)
        problem = problem_of_case(case)
        counts = blocks.law_counts(problem, table, owner, 16)
        expected_owner = torch.full((B, Lq), -1)
        expected = []
        for b in range(B):
            for rows in query_blocks(case.visible[b], case.origin[b], query_block_size):
                seen, begin = case.visible[b, rows], int(case.origin[b, rows[0]])
                expected_owner[b, rows] = len(expected)
                offset = seen[:, 1] - 1 - begin
                assert torch.equal(sampled[b, rows], (offset % 16 == 15) | (rows == rows[-1]))
                of_group = case.budget.expand(case.query.shape[:3])[b].view(case.key.shape[1], -1, Lq)[..., rows]
                width = (int(seen[:, 1].max()) - 1 - begin) // 16 - (int(seen[:, 0].min()) - begin) // 16 + 1
                whole = (of_group.amax(1) >= seen[:, 1] - seen[:, 0]).all(-1)
                wanted = torch.where(whole, width, -(-of_group.amax((1, 2)) // 16)).int()
                found = torch.where(whole, counts[len(expected)].clamp(max=width), counts[len(expected)])
                assert torch.equal(found, wanted)
                row = (b, int(rows[0]), int(rows[-1]) + 1, int(seen[:, 0].min()), int(seen[:, 1].max()), begin)
                expected.append(row)
        assert torch.equal(owner, expected_owner)
        assert torch.stack(tuple(table), -1).tolist() == [list(row) for row in expected]


def test_rows_without_keys_are_in_no_query_block():
    visible = torch.zeros(2, 5, 2, dtype=torch.int32)
    origin = torch.zeros(2, 5, dtype=torch.int32)
    table = blocks.query_block_table(visible, origin, 64)
    assert all(column.shape == (0,) for column in table)
    assert torch.equal(blocks.block_of_rows(table, 2, 5), torch.full((2, 5), -1))
    assert not blocks.sampled_rows(table, visible, origin, 4).any()
    key = torch.zeros(2, 3, 0, 8)
    problem = problem_of(torch.zeros(2, 3, 5, 8), key, key, visible, origin[:, None])
    assert blocks.law_counts(problem, table, torch.full((2, 5), -1), 16).shape == (0, 3)
