"""Attach first: an optimizer built before holds frozen weights, and would train nothing."""

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, train_only
from tests.support.training import distance, random_mask, weights


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, random_mask(model, density=0.5)


def backward(model):
    model(torch.randn(8, 4)).square().sum().backward()


def fish(model, mask):
    return FishSparseAdamW(model.named_parameters(), lr=0.1, mask=mask)


def adamw(model, mask):
    return torch.optim.AdamW(model.parameters(), lr=0.1)


@pytest.mark.parametrize("build", [fish, adamw])
def test_an_optimizer_built_before_attaching_is_refused(build):
    model, mask = make()
    optimizer = build(model, mask)
    train_only(model, mask)
    before = weights(model)
    backward(model)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"'0.weight', .* frozen by train_only.*after train_only"
        ):
            optimizer.step()
    assert distance(weights(model), before) == 0
    assert not optimizer.state
    build(model, mask).step()
    assert distance(weights(model), before) > 0


def test_leaves_that_were_left_out_are_missed():
    model, mask = make()
    train_only(model, mask)
    named = [(n, p) for n, p in model.named_parameters() if n in mask]
    optimizer = FishSparseAdamW(named, lr=0.1, mask=mask)
    backward(model)
    with pytest.raises(RuntimeError, match=r"FishSparseAdamW holds .* frozen by train_only"):
        optimizer.step()


@pytest.mark.parametrize("build", [fish, adamw])
def test_optimizers_of_other_weights_are_nobodys_concern(build):
    model, mask = make()
    handle = train_only(model, mask)
    backward(model)
    other, whole = make(1)
    backward(other)
    before = weights(other)
    build(other, whole).step()
    assert distance(weights(other), before) > 0
    # Leaves that join the weights are the ones that are trained.
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in mask], lr=0.1)
    optimizer.add_param_group({"params": list(handle.parameters())})
    before = weights(model)
    optimizer.step()
    assert distance(weights(model), before) > 0
