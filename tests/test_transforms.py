"""Derivatives that sparse attention does not have, and transforms of ``torch.func``, are refused by name."""

import pytest
import torch
from tiny_models import random_ids
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from ways import SETTINGS, small

from nc_patch import sparse_attention

SECOND, TRANSFORM = "no second derivative .*or unpatch the model", "does not run in transforms .*or unpatch the model"


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"selection": "dense"}], ids=[*SETTINGS, "dense"])
def test_second_derivatives_forward_mode_and_transforms_are_refused(settings):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 8, generator=draw) for heads in (4, 2, 2))
    options = {"alpha": 2.0, "C": 0.5, "backend": "torch"} | settings
    options.pop("key_index", None)
    loss = lambda query: sparse_attention(query, key, value, **options).square().sum()  # noqa: E731
    twice = query.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(twice), twice, create_graph=True)
    again = lambda query: once.square().sum().backward()  # noqa: E731
    by_autograd = lambda query: torch.autograd.functional.hessian(loss, query)  # noqa: E731
    for derivative in (again, by_autograd):
        with pytest.raises(NotImplementedError, match=SECOND):
            derivative(query)
    by_tangent = lambda query: jvp(loss, (query,), (query,))  # noqa: E731
    by_dual_number = forward_ad.dual_level()(lambda query: loss(forward_ad.make_dual(query, query)))
    for transformed in (
        grad(loss),
        lambda q: vmap(loss)(q[None]),
        jacfwd(loss),
        hessian(loss),
        by_tangent,
        by_dual_number,
    ):
        with pytest.raises(NotImplementedError, match=TRANSFORM):
            transformed(query)


def test_models_are_called_with_other_parameters_but_not_transformed():
    model, ids = small(selection="topk"), random_ids(3, 30)
    parameters = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, ids, mask):
        kwargs = {"use_cache": False, "labels": ids, "attention_mask": mask}
        return functional_call(model, parameters, (ids,), kwargs).loss

    mask = torch.ones_like(ids)
    found = loss(parameters, ids, mask)
    with pytest.raises(NotImplementedError, match=TRANSFORM):
        vmap(grad(lambda parameters, ids, mask: loss(parameters, ids[None], mask[None])), (None, 0, 0))(
            parameters, ids, mask
        )
    model.load_state_dict(parameters)
    assert torch.equal(model(ids, use_cache=False, labels=ids).loss, found)
