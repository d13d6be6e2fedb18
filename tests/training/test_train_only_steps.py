"""Around the steps of any optimizer: weights follow leaves, and others pay next to nothing."""

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, SparseMask, train_only

SHAPE = (4, 4)
AT = torch.tensor([1, 7])


@pytest.fixture
def attached_model():
    torch.manual_seed(0)
    model = nn.Linear(*SHAPE, bias=False)
    return model, train_only(model, SparseMask({"weight": AT}, {"weight": SHAPE}))


def other():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param


def step_follows(optimizer, model, handle):
    """One step; the weights have what the leaf has."""
    before = model.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    (leaf,) = handle.parameters()
    assert torch.equal(model.weight.detach().view(-1)[AT], leaf.detach())
    return not torch.equal(model.weight.detach(), before)


def test_leaves_that_an_optimizer_gets_after_its_first_step(attached_model):
    model, handle = attached_model
    optimizer = torch.optim.SGD([other()], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": list(handle.parameters())})
    assert step_follows(optimizer, model, handle)


def test_a_leaf_put_in_the_place_of_another_parameter(attached_model):
    model, handle = attached_model
    optimizer = torch.optim.SGD([other()], lr=0.1)
    optimizer.step()
    (optimizer.param_groups[0]["params"][0],) = handle.parameters()
    assert step_follows(optimizer, model, handle)


def test_a_second_model_that_is_attached_later(attached_model):
    model, handle = attached_model
    second = nn.Linear(*SHAPE, bias=False)
    optimizer = torch.optim.SGD(list(handle.parameters()), lr=0.1)
    assert step_follows(optimizer, model, handle)
    following = train_only(second, SparseMask({"weight": AT}, {"weight": SHAPE}))
    optimizer.add_param_group({"params": list(following.parameters())})
    assert step_follows(optimizer, second, following)


def test_leaves_taken_away_are_followed_no_more(attached_model):
    model, handle = attached_model
    optimizer = torch.optim.SGD(list(handle.parameters()), lr=0.1)
    assert step_follows(optimizer, model, handle)
    optimizer.param_groups[0]["params"] = [other()]
    assert not step_follows(optimizer, model, handle)


def test_optimizers_without_leaves_are_looked_through_once(attached_model, monkeypatch):
    """Each other optimizer's step pays for what is done here, also of models never attached."""
    model, handle = attached_model
    optimizers = [torch.optim.SGD([other()], lr=0.1), torch.optim.SGD(handle.parameters(), lr=0.1)]
    for optimizer in optimizers:
        optimizer.step()  # the second's is no step of the leaves: they have no gradient
    assert step_follows(optimizers[1], model, handle)
    looks = []
    monkeypatch.setattr(
        type(handle), "named_parameters", lambda self: looks.append(self) or iter(())
    )
    for optimizer in optimizers:
        optimizer.step()
    assert not looks


def test_nor_do_they_pay_for_leaves_that_never_step(attached_model, monkeypatch):
    _, handle = attached_model
    optimizer = torch.optim.SGD([other()], lr=0.1)
    optimizer.step()
    looks = []
    monkeypatch.setattr(type(handle), "named_parameters", looks.append)
    optimizer.step()
    assert not looks


@pytest.mark.parametrize("watched", [False, True])
def test_own_steps_need_no_hooks(attached_model, monkeypatch, watched):
    """What torch wraps around a step takes longer than a small step, and train_only needs none."""
    model, handle = attached_model
    optimizer = FishSparseAdamW(handle.parameters(), lr=0.1)
    seen, records = [], []
    if watched:
        optimizer.register_step_post_hook(lambda *_: seen.append(True))
    enter = torch.autograd.profiler.record_function.__enter__
    monkeypatch.setattr(
        torch.autograd.profiler.record_function,
        "__enter__",
        lambda self: records.append(self.name) or enter(self),
    )
    assert step_follows(optimizer, model, handle)
    assert len(seen) == watched
    assert any("FishSparseAdamW" in name for name in records) == watched
