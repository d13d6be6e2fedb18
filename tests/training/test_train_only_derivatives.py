"""Every way to ask autograd for derivatives: the dense ones, or a clear refusal."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from fishkern import FishSparseAdamW, attached, train_only
from tests.support.tolerances import assert_matches
from tests.support.training import distance, leaf_gradients, weights
from tests.training.test_train_only_inputs import I, N, O, Readers, T, column_mask

TERMS = N * T * O


def layers():
    return nn.Sequential(Readers(), nn.LayerNorm(O), nn.Linear(O, 4))


def pair(make=layers):
    """An attached model, and the same one with dense gradients in float64."""
    torch.manual_seed(0)
    model = make()
    truth, mask = copy.deepcopy(model).double(), column_mask(model)
    train_only(model, mask)
    return model, truth, mask


def assert_dense(gradients, truth, mask, times=1):
    assert gradients
    for name, grad in gradients.items():
        dense = times * truth.get_parameter(name).grad.flatten()[mask[name].long()]
        assert_matches(grad, dense, terms=TERMS)


def by_weight(leaves, gradients):
    return {n.replace("fishkern_leaves.", ""): g for n, g in zip(leaves, gradients, strict=True)}


SHAPES = [(N, T, I), (2, 7, I), (1, I), (I,), (4, 0, I), (2, 3, 4, I)]


@pytest.mark.parametrize("order", ["each at once", "all at the end", "all, reversed"])
def test_micro_batches_of_any_shapes_add_up(order):
    model, truth, mask = pair()
    for _ in range(2):  # readers of one input find each other in the first round
        losses = []
        for shape in SHAPES:
            x = torch.randn(shape)
            truth(x.double()).square().sum().backward()
            losses.append(model(x).square().sum())
            if order == "each at once":
                losses.pop().backward()
        for loss in reversed(losses) if "reversed" in order else losses:
            loss.backward()
    assert_dense(leaf_gradients(model), truth, mask)


def test_a_retained_graph_gives_the_same_gradients_again():
    model, truth, mask = pair()
    for _ in range(2):
        model.zero_grad(), truth.zero_grad()
        x = torch.randn(N, T, I)
        truth(x.double()).square().sum().backward()
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        x.normal_()  # what was kept is a copy
        model(x)
        loss.backward(retain_graph=True)
        loss.backward()
        assert_dense(leaf_gradients(model), truth, mask, times=3)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_gradients_of_some_leaves_or_of_the_input_alone():
    model, truth, mask = pair()
    leaves = dict(attached(model).named_parameters())
    for _ in range(2):
        truth.zero_grad()
        x = torch.randn(N, T, I, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        truth(exact).square().sum().backward()
        loss = model(x).square().sum()
        found = torch.autograd.grad(loss, leaves.values(), retain_graph=True)
        assert_dense(by_weight(leaves, found), truth, mask)
        for name, leaf in leaves.items():
            (grad,) = torch.autograd.grad(loss, [leaf], retain_graph=True)
            assert_dense(by_weight([name], [grad]), truth, mask)
        (grad,) = torch.autograd.grad(loss, [x])
        assert_matches(grad, exact.grad, terms=TERMS)
        assert all(leaf.grad is None for leaf in leaves.values())


class Transposed(nn.Module):
    """An embedding, and a linear layer that is transposed."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, I), Conv1D(4, I)

    def forward(self, x):
        return self.linear(self.embedding(x.abs().sum(-1).long() % 20))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_several_gradients_at_once(way, transposed):
    model, truth, mask = pair(Transposed) if transposed else pair()
    x, grads = torch.randn(N, T, I), torch.randn(2, N, T, 4)
    leaves = dict(attached(model).named_parameters())
    for _ in range(2):
        out = model(x)

        def take(grad, out=out, **kwargs):
            return torch.autograd.grad(
                out, list(leaves.values()), grad, retain_graph=True, **kwargs
            )

        if way == "vmap":
            found = torch.func.vmap(take)(grads)
        else:
            found = take(grads, is_grads_batched=True)
        for i, grad in enumerate(grads):
            truth.zero_grad()
            truth(x.double()).backward(grad.double())
            assert_dense(by_weight(leaves, [g[i] for g in found]), truth, mask)


def test_hooks_of_leaves_see_and_change_the_selected_gradient_once():
    model, truth, mask = pair()
    calls = []
    for leaf in attached(model).parameters():
        leaf.register_hook(lambda grad: 2 * grad)
        leaf.register_post_accumulate_grad_hook(calls.append)
    x = torch.randn(N, T, I)
    for each, values in ((truth, x.double()), (model, x)):
        each(values).square().sum().backward()
    assert_dense(leaf_gradients(model), truth, mask, times=2)
    assert len(calls) == len(leaf_gradients(model))


@pytest.mark.parametrize("make", [torch.optim.SGD, FishSparseAdamW])
def test_a_step_of_each_leaf_in_the_backward_pass_is_the_step_after_it(make):
    model, _, _ = pair()
    twin = copy.deepcopy(model)
    optimizers = {leaf: make([leaf], lr=0.01) for leaf in attached(model).parameters()}

    def step(leaf):
        optimizers[leaf].step()
        optimizers[leaf].zero_grad()

    for leaf in optimizers:
        leaf.register_post_accumulate_grad_hook(step)
    optimizer, start = make(attached(twin).parameters(), lr=0.01), weights(model)
    for _ in range(3):
        x = torch.randn(N, T, I)
        model(x).square().sum().backward()
        twin(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(weights(model), weights(twin)) == 0
    assert distance(weights(model), start) > 0


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    model, truth, mask = pair()
    x = torch.randn(N, T, I)
    truth(x.double()).square().sum().backward()
    with torch.autograd.detect_anomaly():
        model(x).square().sum().backward()
        assert_dense(leaf_gradients(model), truth, mask)
        with pytest.raises(RuntimeError, match="nan values"):
            (model(x) * float("nan")).sum().backward()


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own tracing
def test_jacobians_vector_products_and_forward_mode():
    model, truth, _ = pair()
    x, tangent = torch.randn(N, T, I), torch.randn(N, T, I)
    _, expected = torch.func.jvp(truth, (x.double(),), (tangent.double(),))

    def dual(each, x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(each(forward_ad.make_dual(x, tangent))).tangent

    def no_grad(each, x, tangent):
        with torch.no_grad():
            return dual(each, x, tangent)

    ways = {
        "jvp": lambda: torch.func.jvp(model, (x,), (tangent,))[1],
        "linearize": lambda: torch.func.linearize(model, x)[1](tangent),
        "dual": lambda: dual(model, x, tangent),
        "no grad": lambda: no_grad(model, x, tangent),
    }
    for way in 2 * list(ways):
        assert_matches(ways[way]().detach(), expected.detach(), terms=TERMS)
    jacobian = torch.autograd.functional.jacobian(model, x[0, 0])
    expected = torch.autograd.functional.jacobian(truth, x[0, 0].double())
    assert_matches(jacobian, expected, terms=TERMS)


def test_forward_mode_in_a_leaf():
    model, truth, mask = pair()
    x = torch.randn(N, T, I)
    for name, leaf in attached(model).named_parameters():
        own, tangent = name.replace("fishkern_leaves.", ""), torch.randn_like(leaf)
        dense = torch.zeros(truth.get_parameter(own).numel()).double()
        dense[mask[own].long()] = tangent.double()
        found = []
        for each, key, values, t in (
            (model, name, leaf.detach(), tangent),
            (truth, own, truth.get_parameter(own).detach(), dense.view(mask.shapes[own])),
        ):
            with forward_ad.dual_level():
                given = {key: forward_ad.make_dual(values, t)}
                out = torch.func.functional_call(each, given, (x.to(values.dtype),))
                found.append(forward_ad.unpack_dual(out).tangent.detach())
        assert_matches(*found, terms=TERMS)
