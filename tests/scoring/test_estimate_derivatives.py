"""Losses and models that take gradients themselves, or put layers into torch.func's transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishkern import baseline_scores
from tests.support.oracle import assert_exact
from tests.support.tolerances import assert_scores_match

H, C, N = 4, 3, 5


def class_losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    losses = F.cross_entropy(model(x), batch[1], reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + grad.square().sum(1)


def adversarial(model, batch):
    x = batch[0].clone().requires_grad_()
    class_losses(model, (x, batch[1])).sum().backward()
    return class_losses(model, (x.detach() + 0.1 * x.grad.sign(), batch[1]))


def leaves_gradients(model, batch):
    losses = class_losses(model, batch)
    losses.sum().backward(retain_graph=True)
    return losses


def leaves_gradients_unseen(model, batch):
    """No function mode is told of this one."""
    losses = class_losses(model, batch)
    torch.autograd.backward(losses.sum(), retain_graph=True)
    return losses


def functional_penalty(model, batch):
    def one(x, y):
        return F.cross_entropy(model(x[None]), y[None])

    grads = torch.func.vmap(torch.func.grad(one))(*batch)
    return class_losses(model, batch) + grads.square().sum(1)


def batches():
    torch.manual_seed(0)
    return [(torch.randn(N, H), torch.randint(0, C, (N,))) for _ in range(2)]


def check(model, loss_fn, **kwargs):
    model.register_buffer("seen", torch.zeros(()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    scores = assert_exact(
        model, batches(), lambda m, b: loss_fn(m, b).sum(), loss_fn=loss_fn, **kwargs
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for param in model.parameters():
        assert param.requires_grad
        assert torch.equal(param.grad, torch.ones_like(param))
    return scores


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    "loss_fn", [penalty, adversarial, leaves_gradients, leaves_gradients_unseen]
)
def test_a_loss_that_takes_gradients_itself(loss_fn, verify):
    model = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C))
    scores = check(model, loss_fn, verify=verify)
    assert set(scores.routes.values()) == {"loop"}
    assert set(scores.reasons.values()) == {"loss_fn or the model takes gradients itself"}


def test_a_loss_that_takes_gradients_by_torch_func():
    scores = check(nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C)), functional_penalty)
    assert set(scores.routes.values()) == {"loop"}


class Transforming(nn.Module):
    """Runs its first layer in ways of its own."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer, self.last = way, nn.Linear(H, H), nn.Linear(H, C)
        self.scale = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x):
        return self.last(torch.tanh(self.way(lambda row: self.layer(row) * self.scale, x)))


def mapped(layer, x):
    return torch.func.vmap(layer)(x)


def mapped_elsewhere(layer, x):
    x = x.unsqueeze(1).expand(-1, 3, -1)
    return torch.func.vmap(layer, in_dims=1, out_dims=1)(x).sum(1)


def pulled(layer, x):
    return torch.func.vmap(torch.func.grad(lambda row: torch.tanh(layer(row)).sum()))(x)


def pushed(layer, x):
    return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[0]


@pytest.mark.parametrize("way", [mapped, mapped_elsewhere, pulled, pushed])
def test_a_layer_inside_a_transform(way):
    scores = check(Transforming(way), class_losses)
    loops = {name for name, route in scores.routes.items() if route == "loop"}
    assert loops == {"layer.weight", "layer.bias", "scale"}
    assert all("no rule sees" in scores.reasons[name] for name in loops)


class Forces(nn.Module):
    """Returns the gradient of an energy, as models of molecules do."""

    def __init__(self):
        super().__init__()
        self.energy, self.last = nn.Linear(H, H), nn.Linear(H, C)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (forces,) = torch.autograd.grad(torch.tanh(self.energy(x)).sum(), x, create_graph=True)
        return self.last(forces)


def test_a_model_that_takes_gradients_itself():
    check(Forces(), class_losses)


def test_gradients_that_a_loss_leaves_are_not_added_to_baseline_scores():
    (batch, _) = batches()
    model = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C))
    scores = baseline_scores(
        model, [batch], kind="gradient", loss_fn=leaves_gradients, progress=False
    )
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(class_losses(model, batch).mean(), list(params.values()))
    assert_scores_match(scores, {n: g.abs().double() for n, g in zip(params, grads, strict=True)})
