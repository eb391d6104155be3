"""``torch.func`` through sparse attention: gradients and maps give autograd's numbers; what there is not is named."""

import pytest
import torch
from tiny_models import random_ids
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from ways import EACH_SETTING, SETTINGS, small

from nc_patch import nc_stats, sparse_attention

SELECTIONS = {**SETTINGS, "dense": {"selection": "dense"}}
EACH_SELECTION = pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)
SECOND, FORWARD = "no second derivative .*or unpatch the model", "no derivative in forward mode .*or unpatch the model"
# PyTorch says that it maps over an operation by a loop.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def energy(settings):
    """The function of queries ``[1, 4, 40, 8]``, a scalar of it, and queries."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 8, generator=draw) for heads in (4, 2, 2))
    options = {"alpha": 2.0, "C": 0.5, "backend": "torch"} | settings
    options.pop("key_index", None)
    attend = lambda query: sparse_attention(query, key, value, **options)  # noqa: E731
    return attend, lambda query: attend(query).square().sum(), query


def by_autograd(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


@EACH_SELECTION
def test_gradients_of_transforms_are_autograds(settings):
    attend, loss, query = energy(settings)
    expected = by_autograd(loss, query)
    assert torch.equal(grad(loss)(query), expected)
    assert torch.equal(vjp(loss, query)[1](torch.ones(()))[0], expected)
    several = torch.stack((query, 2 * query))
    assert torch.equal(vmap(attend)(several)[1], attend(2 * query))
    torch.testing.assert_close(vmap(grad(loss))(several)[1], by_autograd(loss, 2 * query))
    torch.testing.assert_close(grad(lambda q: vmap(loss)(q).sum())(several)[1], by_autograd(loss, 2 * query))
    row = jacrev(lambda q: attend(q)[0, 1, -1, :2])(query)
    torch.testing.assert_close(row[1], by_autograd(lambda q: attend(q)[0, 1, -1, 1], query))


@EACH_SELECTION
def test_second_derivatives_and_forward_mode_are_refused_by_name(settings):
    _, loss, query = energy(settings)
    twice = query.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(twice), twice, create_graph=True)
    again = lambda query: once.square().sum().backward()  # noqa: E731
    by_autograd_twice = lambda query: torch.autograd.functional.hessian(loss, query)  # noqa: E731
    for derivative in (again, grad(lambda q: grad(loss)(q).sum()), by_autograd_twice):
        with pytest.raises(NotImplementedError, match=SECOND):
            derivative(query)
    by_tangent = lambda query: jvp(grad(loss), (query,), (query,))  # noqa: E731
    by_dual_number = forward_ad.dual_level()(lambda query: loss(forward_ad.make_dual(query, query)))
    for derivative in (jacfwd(loss), jacfwd(grad(loss)), hessian(loss), by_tangent, by_dual_number):
        with pytest.raises(NotImplementedError, match=FORWARD):
            derivative(query)


@pytest.mark.parametrize("track", [False, True], ids=["", "tracked"])
@EACH_SETTING
def test_gradients_of_every_sample_are_those_of_each_alone(settings, track):
    model, ids = small(track=track, **settings), random_ids(3, 30)
    parameters = dict(model.named_parameters())

    def loss(parameters, ids):
        return functional_call(model, parameters, (ids,), {"use_cache": False, "labels": ids}).loss

    assert torch.equal(loss(parameters, ids), model(ids, use_cache=False, labels=ids).loss)
    stats = nc_stats(model)
    each = vmap(grad(lambda parameters, row: loss(parameters, row[None])), (None, 0))(parameters, ids)
    assert nc_stats(model) == stats  # as in a compiled graph, nothing is counted
    for row in range(3):
        model.zero_grad()
        model(ids[row : row + 1], use_cache=False, labels=ids[row : row + 1]).loss.backward()
        expected = {name: parameter.grad for name, parameter in parameters.items()}
        torch.testing.assert_close({name: g[row] for name, g in each.items()}, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_mapped_is_refused():
    by_index = ({"selection": "block"}, 1, r"decoding by an index does not run inside a transform")
    for options, length, reason in (by_index, ({"on_drop": "warn"}, 20, r"nor a transform of torch.func")):
        model = small(**options)
        with pytest.raises(RuntimeError, match=reason), torch.no_grad():
            vmap(lambda row, model=model: model(row[None]).logits[0])(random_ids(2, length))
