"""Layers of one's own: one rule in one place serves scoring and training."""

import copy

import pytest
import torch
from torch import nn

import fishkern
from fishkern import SparseMask, attached, estimate_fisher, train_only
from fishkern.interception import Selection, rules
from tests.support.tolerances import assert_matches
from tests.support.training import leaf_gradients
from tests.training.test_train_only_inputs import I, N, O, T


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The rules as they were, afterwards."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


class Power(nn.Module):
    """A made-up layer: each feature to the power of its own exponent."""

    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.rand(I) + 1)

    def forward(self, x):
        return x.abs() ** self.exponent


class PowerRule(fishkern.Rule):
    params = ("exponent",)

    def sample_grads(self, module, x, grad_out):
        x = x.abs()
        exponent = module._parameters["exponent"]
        return {"exponent": (grad_out * x**exponent * x.log()).sum(1)}

    def prepare(self, module, name, indices):
        return Selection(indices, route="by feature")

    def selected_grad(self, module, name, selection, x, grad_out):
        index, x = selection.indices, x.abs()[..., selection.indices]
        exponent = module._parameters["exponent"][index]
        return (grad_out[..., index] * x**exponent * x.log()).flatten(0, -2).sum(0)


def test_one_rule_in_one_place_serves_scoring_and_training():
    fishkern.register_rule(Power, PowerRule())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(I, I), Power(), nn.Linear(I, 1))
    x, y = torch.randn(N, T, I), torch.randn(N)

    def losses(model, batch):
        return (model(batch["x"]).mean((1, 2)) - batch["y"]).square()

    fisher = estimate_fisher(model, [{"x": x, "y": y}], loss_fn=losses, progress=False)
    assert fisher.routes["1.exponent"] == "fused"
    truth = copy.deepcopy(model).double()
    losses(truth, {"x": x.double(), "y": y.double()}).sum().backward()
    mask = fishkern.select(fisher, k=40, scope="tensor")
    train_only(model, mask)
    losses(model, {"x": x, "y": y}).sum().backward()
    dense = {name: param.grad for name, param in truth.named_parameters()}
    found = leaf_gradients(model)
    assert len(found["1.exponent"])
    for name, grad in found.items():
        assert_matches(grad, dense[name].flatten()[mask[name].long()], terms=N * T)
    assert "by feature" in attached(model).report()


class Pair(nn.Module):
    """A made-up layer of two matrices that read the same input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(O, I)) for _ in range(2))

    def forward(self, x):
        return x @ (self.left + 2 * self.right).T


class PairRule(fishkern.Rule):
    params = ("left", "right")

    def sample_grads(self, module, x, grad_out):
        grad = grad_out.mT @ x
        return {"left": grad, "right": 2 * grad}

    def prepare(self, module, name, indices):
        return Selection(indices, columns=(indices % I).unique())

    def selected_grad(self, module, name, selection, x, grad_out):
        grad = torch.zeros(O, I)
        grad[:, selection.columns] = grad_out.flatten(0, -2).T @ x.flatten(0, -2)
        return grad.flatten()[selection.indices] * (2 if name == "right" else 1)


def test_a_matrix_that_is_trained_whole_beside_a_selected_one_reads_all_of_the_input():
    fishkern.register_rule(Pair, PairRule())
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(N, T, I)
    truth = copy.deepcopy(model).double()
    mask = SparseMask({"left": torch.tensor([3, I + 5])}, {"left": (O, I)})
    train_only(model, mask, unlisted="train")
    for each, values in ((truth, x.double()), (model, x)):
        each(values).square().sum().backward()
    assert_matches(model._parameters["right"].grad, truth.right.grad, terms=N * T)
    expected = truth.left.grad.flatten()[mask["left"].long()]
    assert_matches(leaf_gradients(model)["left"], expected, terms=N * T)
