"""``train_only`` of convolutions and the norms between them: exact gradients of the leaves."""

import copy

import pytest
import torch
from torch import nn

from fishkern import attached, train_only
from tests.support.images import C, Twice, conv2d, images, net
from tests.support.oracle import squared_error
from tests.support.tolerances import assert_matches, assert_scores_match
from tests.support.training import random_mask

TRAINED = {
    "settings": lambda: net(
        conv2d(padding=1, groups=2),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        conv2d(in_channels=6, padding=1, padding_mode="reflect"),
        nn.SiLU(),  # a bias right before such a norm has a gradient of zero
        nn.InstanceNorm2d(6, affine=True),
        conv2d(in_channels=6, kernel_size=2, padding="same"),
        nn.SiLU(),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
    ),
    "twice": lambda: Twice(shrink=True, padding=0),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("training", [True, False])
def test_train_only_gives_exact_leaf_gradients(name, training):
    model = TRAINED[name]().train(training)
    batch, mask = images(), random_mask(model, density=0.3)

    def dense(dtype):
        twin = copy.deepcopy(model).to(dtype)
        squared_error(twin, tuple(t.to(dtype) for t in batch)).sum().backward()
        grads = {n: p.grad.flatten() for n, p in twin.named_parameters()}
        return {n: grads[n][mask[n].long()] for n in mask if len(mask[n])}

    truth, rounded = dense(torch.float64), dense(torch.float32)
    train_only(model, mask)
    squared_error(model, batch).sum().backward()
    found = {
        n.replace("fishkern_leaves.", ""): leaf.grad
        for n, leaf in attached(model).named_parameters()
    }
    assert_scores_match(found, truth, rounded)


def test_train_only_of_an_unbatched_input():
    conv = conv2d(padding="same", padding_mode="circular")
    x, mask = torch.randn(C, 7, 6, requires_grad=True), random_mask(conv, density=0.3)
    expected = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight, conv.bias))
    train_only(conv, mask)
    conv(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    leaves = dict(attached(conv).named_parameters())
    for name, grad in zip(("weight", "bias"), expected[1:], strict=True):
        found = leaves[f"fishkern_leaves.{name}"].grad
        torch.testing.assert_close(found, grad.flatten()[mask[name].long()])


@pytest.mark.parametrize("attached_in", [True, False])
@pytest.mark.parametrize("forward_in", [True, False])
@pytest.mark.parametrize("backward_in", [True, False])
def test_batch_norm_in_the_mode_of_its_forward(attached_in, forward_in, backward_in):
    """Also where modes are switched, or other batches pass, before the backward pass."""
    model, twin = (net(conv2d(), nn.BatchNorm2d(6), nn.Tanh()) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    (x, y), other = images(), images()[0]
    mask = random_mask(model, density=0.5)
    train_only(model.train(attached_in), mask)
    for each in (model, twin):
        loss = squared_error(each.train(forward_in), (x, y)).sum()
        each.train(backward_in)
        if forward_in and backward_in:
            each(other)
        loss.backward()
    for name, buffer in twin.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    for name, leaf in attached(model).named_parameters():
        weight = name.replace("fishkern_leaves.", "")
        dense = dict(twin.named_parameters())[weight].grad.flatten()
        assert_matches(leaf.grad, dense[mask[weight].long()], terms=x[:, 0].numel())
