"""sparse_attention: the contract of its custom ops, and what it refuses.

``test_fuzz.py`` holds that its numbers are right, ``test_selection.py`` that it compiles.
"""

import pytest
import torch
from attention_cases import PREFILL, random_case
from operations import problem_of_case
from test_attention import INSTALLED

from nc_patch import library, sparse_attention


def tensors():
    return [torch.randn(shape) for shape in ((2, 6, 20, 16), (2, 2, 31, 16), (2, 2, 31, 8))]


@pytest.mark.parametrize("way", [way for way in PREFILL if way != "drop"])
def test_custom_ops_keep_the_contract_of_torch(way):
    case = random_case(8, longest=40)
    for t in (case.query, case.key, case.value):
        t.requires_grad_()
    problem, chosen = problem_of_case(case, stats=True), case.selection(way)
    for backend in INSTALLED:  # the kernels for CPUs have no gradient, and return what compiled graphs expect
        problem = problem if backend == "torch" else problem_of_case(random_case(8, longest=40))
        arguments = (problem.tensors(), *library.arguments(chosen, problem, backend))
        utils = {} if backend == "torch" else {"test_utils": "test_faketensor"}
        torch.library.opcheck(library.operation(chosen, problem, backend), arguments, **utils)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": [1.0, 2.0]}, "given for 2 heads, query has 6"),
        ({"query": torch.zeros(6, 20, 16)}, r"query must be \[batch, heads, .*\], got shape \(6, 20, 16\)"),
        ({"query": torch.zeros(2, 5, 20, 16)}, "multiple of the key/value heads, got 5 and 2"),
        ({"query": torch.zeros(2, 6, 20, 16).double()}, "one of bfloat16, float16, float32, got torch.float64"),
        ({"key": torch.zeros(2, 2, 31, 16).half()}, "key must have query's dtype"),
        ({"key": torch.zeros(2, 2, 31, 8)}, "key must be"),
        ({"value": torch.zeros(2, 2, 30, 8)}, "key must be"),
        ({"value": torch.zeros(2, 2, 31, 0)}, r"head_dim must be at least 1, .*value \(2, 2, 31, 0\)"),
        ({"query": torch.zeros(2, 6, 40, 16)}, "at least as many keys as queries, got Lq=40 and Lk=31"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"scale": float("nan")}, "scale must be a positive number, got nan"),
        ({"softcap": -1.0}, "softcap must be a positive number or None, got -1.0"),
        ({"sinks": torch.zeros(2)}, r"sinks must be \[6\]"),
        ({"visible": torch.zeros(2, 20, 2)}, r"visible must be int32 \[2, 20, 2\]"),
        ({"visible": torch.full((2, 20, 2), 32).int()}, "within the keys, 0 to 31, got 32 to 32"),
        ({"visible": torch.tensor([5, 3]).int().expand(2, 20, 2)}, "ends before it starts"),
        (
            {"visible": torch.stack((torch.arange(20), torch.arange(20) + 9), -1).int().expand(2, 20, 2)},
            r"the interval \[0, 9\] in sequence 0 of the batch, which reaches from 0 to 1, and page means",
        ),
        ({"origin": torch.zeros(2, 20)}, r"origin must be int32 \[2, 20\]"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    query, key, value = tensors()
    arguments = {"query": query, "key": key, "value": value, "alpha": 2.0, "C": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)


@pytest.mark.parametrize(
    "option", [{"dense_layers": (0,)}, {"track": True}, {"key_index": "never"}, {"on_drop": "warn"}, {"decode": "topk"}]
)
def test_options_of_patched_models_are_refused_by_name(option):
    name = next(iter(option))
    with pytest.raises(TypeError, match=f"{name} acts in .*; sparse_attention takes .*sink_keys.*ask for return_stats"):
        sparse_attention(*tensors(), alpha=1.0, C=0.5, **option)
