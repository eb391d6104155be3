"""Attention fidelity: what sparse attention keeps of dense attention's rows, layer by layer, head by head, by position.

Every layer gets the queries, keys and values of a dense forward pass, so that one layer's error does not reach the
next: figures say where a method loses, not what a model loses by it. A good mean can hide a bad layer, or a bad one
mean little.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eval_tasks.capture import Received, receive
from eval_tasks.errors import EvalError
from eval_tasks.matching import Budgets
from eval_tasks.methods import find_method
from eval_tasks.simulated import Simulated
from nc_patch import AttentionResult, NCConfig
from nc_patch.functional import attend
from nc_patch.ops.problem import Problem
from nc_patch.selections import Dense

# The queries that are measured at each length: the last ones, a whole block of queries for every selection.
ROWS = 64


@dataclass(frozen=True)
class Fidelity:
    """One method in one layer at one length, means over the last ``ROWS`` queries of a sample.

    Attributes:
        method, length, sample, layer: which; the last query is at position ``length`` - 1, and sees ``length`` keys
            unless the layer has a window.
        kept_mass: of each query head, the dense softmax weight of the keys that are attended.
        output_error: of each query head, ‖o − o_dense‖ / ‖o_dense‖.
        attended_fraction: attended keys / visible keys.
    """

    method: str
    length: int
    sample: int
    layer: int
    kept_mass: list[float]
    output_error: list[float]
    attended_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        return asdict(self)


def fidelity(
    model: Any,
    ids: torch.Tensor,
    methods: Sequence[str],
    budgets: Budgets,
    lengths: Sequence[int],
    sample: int = 0,
    layers: Sequence[int] | None = None,
) -> Iterator[Fidelity]:
    """Compares methods with dense attention on what the layers of a model receive.

    Args:
        model: a causal language model that ``patch_model`` takes; windows, soft-caps and sinks are those of its layers.
        ids: int64 ``[1, L]``, L at least the longest length.
        methods: names as in ``find_method``, without dense and without simulated ones.
        budgets: of the methods.
        lengths: how many tokens are read up to the last measured query; one forward pass serves all of them.
        sample: a number for the results.
        layers: which; None for all.

    Raises:
        EvalError: a method has no attention of its own, or a length does not fit.
    """
    configs = [(name, length, _config(name, budgets, length)) for name in methods for length in lengths]
    if min(lengths) < ROWS or max(lengths) > ids.shape[1]:
        raise EvalError(f"lengths must lie between {ROWS} and the {ids.shape[1]} tokens that are read, got {lengths}")
    chosen = list(range(model.config.get_text_config().num_hidden_layers)) if layers is None else list(layers)
    for layer, received in zip(chosen, receive(model, ids[:, : max(lengths)], chosen), strict=True):
        dense: dict[int, torch.Tensor] = {}
        for name, length, config in configs:
            if length not in dense:
                dense[length] = _attend(received, length, NCConfig(1.0, 1.0)).output.float()
            result = _attend(received, length, config)
            assert result.kept_mass is not None
            assert result.attended is not None
            reference = dense[length]
            error = (result.output.float() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-12)
            start, end = received.visible[0, length - ROWS : length].unbind(-1)
            share = (result.attended.float().mean((0, 1)) / (end - start)).mean()
            yield Fidelity(
                name,
                length,
                sample,
                layer,
                result.kept_mass.mean((0, 2)).tolist(),
                error.mean((0, 2)).tolist(),
                float(share),
            )


def _config(name: str, budgets: Budgets, length: int) -> NCConfig:
    method = find_method(name)
    config = method.config(budgets.at(length))
    if config is None or isinstance(config, Simulated) or method.press is not None:
        raise EvalError(f"{name} is no sparse attention of this package: fidelity compares those with dense attention")
    return config


def _attend(received: Received, length: int, config: NCConfig) -> AttentionResult:
    visible = received.visible[:, length - ROWS : length].contiguous()
    problem = Problem(
        received.query[:, :, length - ROWS : length],
        received.key[:, :, :length],
        received.value[:, :, :length],
        visible,
        torch.zeros_like(visible[..., 0]),
        config.row_budgets(visible, length),
        scale=received.scale,
        softcap=received.softcap or 0.0,
        sinks=received.sinks,
        stats=True,
    )
    return attend(problem, Dense() if config.is_dense() else config.prefill, config.backend)
