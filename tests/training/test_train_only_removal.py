"""Attaching that fails and removing leave a model as it was."""

import pytest
import torch
from torch import nn

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.training import (
    distance,
    random_mask,
    weights,
)


def test_remove_leaves_no_trace(case):
    problem, model = case

    def state(module):
        return [
            (type(m), sorted(m._modules), len(m._forward_pre_hooks), sorted(m.__dict__))
            for m in module.modules()
        ], [(n, p.requires_grad) for n, p in module.named_parameters()]

    before, values = state(model), weights(model)
    handle = train_only(model, random_mask(model))
    assert state(model) != before
    handle.remove()
    handle.remove()  # once more does nothing
    assert state(model) == before
    assert attached(model) is None
    assert distance(weights(model), values) == 0
    problem.loss(model, problem.batch()).backward()
    assert any(p.grad is not None for p in model.parameters())


def test_with_statement_keeps_what_was_trained(case):
    problem, model = case
    before = weights(model)
    with train_only(model, random_mask(model)) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        problem.loss(model, problem.batch()).backward()
        optimizer.step()
    assert attached(model) is None
    assert distance(weights(model), before) > 0


def test_flags_set_after_attaching_survive_scoring():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mask = SparseMask({"0.weight": torch.tensor([3])}, {"0.weight": (4, 4)})
    train_only(model, mask, unlisted="train")
    model[1].bias.requires_grad_(False)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    batch = (torch.randn(3, 4), torch.randn(3, 2))
    fishkern.estimate_fisher(
        model, [batch], loss_fn=lambda m, b: (m(b[0]) - b[1]).square().sum(1), progress=False
    )
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


def test_a_failing_attachment_leaves_no_trace(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = [(type(m), sorted(m._modules)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "register_forward_pre_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        train_only(model, random_mask(model))
    assert [(type(m), sorted(m._modules)) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert attached(model) is None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, FishSparseAdamW])
def test_any_optimizer_of_removed_leaves_is_refused(make):
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = make(handle.parameters(), lr=0.1)
    model(torch.randn(1, 4)).sum().backward()
    optimizer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="train_only was removed"):
        optimizer.step()
    other = make(model.parameters(), lr=0.1)  # one of the model's own trains on
    model(torch.randn(1, 4)).sum().backward()
    other.step()


def test_scoring_in_between_does_not_remove_leaves():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    batch = (torch.randn(3, 4), torch.randn(3, 4))
    fishkern.estimate_fisher(
        model, [batch], loss_fn=lambda m, b: (m(b[0]) - b[1]).square().sum(1), progress=False
    )
    before = weights(model)
    model(torch.randn(1, 4)).sum().backward()
    optimizer.step()
    assert distance(weights(model), before) > 0
