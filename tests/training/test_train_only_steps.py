"""Around the steps of any optimizer: weights follow leaves, and others pay next to nothing."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
)

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
    (leaf,) = handle.parameters()
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    assert step_follows(optimizer, model, handle)
    optimizer.param_groups[0]["params"] = [other()]
    leaf.data.add_(1)
    optimizer.step()
    assert not torch.equal(model.weight.detach().view(-1)[AT], leaf.detach())


def test_a_model_attached_after_its_optimizers_first_step(attached_model):
    """What was found out about an optimizer does not hold for models that are attached later."""
    later = nn.Linear(*SHAPE, bias=False)
    optimizer = torch.optim.SGD(later.parameters(), lr=0.1)
    later.weight.grad = torch.ones(SHAPE)
    optimizer.step()
    train_only(later, SparseMask({"weight": AT}, {"weight": SHAPE}))
    with pytest.raises(RuntimeError, match="build the optimizer after train_only"):
        optimizer.step()


def test_a_step_while_the_leaves_are_off(attached_model):
    model, handle = attached_model
    optimizer = torch.optim.SGD(list(handle.parameters()), lr=0.1)
    assert step_follows(optimizer, model, handle)
    with handle.suspended():
        optimizer.step()
    assert step_follows(optimizer, model, handle)


def test_a_step_while_a_module_is_out_of_the_model():
    model = nn.Sequential(nn.Linear(*SHAPE, bias=False), nn.Linear(*SHAPE, bias=False))
    mask = SparseMask({"1.weight": AT}, {"1.weight": SHAPE})
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = torch.optim.SGD(list(handle.parameters()), lr=0.1)
    module, model[1] = model[1], nn.Identity()
    optimizer.step()
    model[1] = module
    (leaf,) = handle.parameters()
    leaf.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(module.weight.detach().view(-1)[AT], leaf.detach())


def test_a_leaf_exchanged_by_assignment(attached_model):
    model, _ = attached_model
    leaf = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    leaf.grad = torch.ones(2)
    optimizer.step()
    model.fishkern_leaves.weight = leaf
    optimizer.step()
    assert torch.equal(model.weight.detach().view(-1)[AT], leaf.detach())


def test_an_optimizer_that_has_no_hash(attached_model):
    model, handle = attached_model

    class Equal(torch.optim.SGD):
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Equal)

    Equal([other()], lr=0.1).step()
    assert step_follows(Equal(list(handle.parameters()), lr=0.1), model, handle)


def test_hooks_of_others_in_the_place_of_these(attached_model):
    model, handle = attached_model
    before, seen = dict(_global_optimizer_pre_hooks), []
    _global_optimizer_pre_hooks.clear()
    other_hook = register_optimizer_step_post_hook(lambda *_: seen.append(True))
    try:
        assert step_follows(FishSparseAdamW(handle.parameters(), lr=0.1), model, handle)
        assert seen == [True]
    finally:
        other_hook.remove()
        _global_optimizer_pre_hooks.update(before)


def test_hooks_that_somebody_removed_come_back(attached_model):
    before = dict(_global_optimizer_post_hooks)
    _global_optimizer_post_hooks.clear()
    try:
        model = nn.Linear(*SHAPE, bias=False)
        handle = train_only(model, SparseMask({"weight": AT}, {"weight": SHAPE}))
        assert step_follows(torch.optim.SGD(handle.parameters(), lr=0.1), model, handle)
    finally:
        _global_optimizer_post_hooks.clear()
        _global_optimizer_post_hooks.update(before)


def test_optimizers_without_leaves_are_looked_through_once(attached_model, monkeypatch):
    """Each other optimizer's step pays for what is done here, also of models never attached."""
    model, handle = attached_model
    own, strange = torch.optim.SGD(handle.parameters(), lr=0.1), torch.optim.SGD([other()], lr=0.1)
    strange.step()
    looks, all_leaves = [], type(handle)._all_leaves
    monkeypatch.setattr(
        type(handle), "_all_leaves", lambda self: looks.append(self) or all_leaves(self)
    )
    strange.step()
    assert not looks  # though these leaves have made no step yet
    assert step_follows(own, model, handle)
    assert handle in looks
    looks.clear()
    own.step()
    strange.step()
    assert handle not in looks


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
