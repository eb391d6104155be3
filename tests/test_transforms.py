"""Derivatives that sparse attention does not have, and transforms of ``torch.func``, are refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as hessian_by_autograd
from torch.func import grad, hessian, jacfwd, jvp, vmap
from ways import SETTINGS

from nc_patch import sparse_attention

SECOND, TRANSFORM = "no second derivative .*or unpatch the model", "does not run in transforms .*or unpatch the model"


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"selection": "dense"}], ids=[*SETTINGS, "dense"])
def test_second_derivatives_forward_mode_and_transforms_are_refused(settings):
    query, key, value = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
    options = {name: option for name, option in settings.items() if name != "key_index"}

    def loss(query):
        return sparse_attention(query, key, value, alpha=2.0, C=0.5, backend="torch", **options).square().sum()

    twice = query.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(twice), twice, create_graph=True)
    for derivative in (once.square().sum().backward, lambda: hessian_by_autograd(loss, query)):
        with pytest.raises(NotImplementedError, match=SECOND):
            derivative()
    for transformed in (
        lambda: grad(loss)(query),
        lambda: vmap(loss)(query[None]),
        lambda: jacfwd(loss)(query),
        lambda: hessian(loss)(query),
        lambda: jvp(loss, (query,), (query,)),
        forward_ad.dual_level()(lambda: loss(forward_ad.make_dual(query, query))),
    ):
        with pytest.raises(NotImplementedError, match=TRANSFORM):
            transformed()
