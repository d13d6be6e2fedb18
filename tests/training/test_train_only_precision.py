"""Leaves keep float32 values of narrower weights."""

import torch
from torch import nn

from fishkern import FishSparseAdamW, SparseMask, train_only
from tests.support.tolerances import assert_matches
from tests.support.training import (
    random_mask,
)


def test_cast_to_bfloat16_keeps_float32_leaves(case):
    problem, model = case
    mask = random_mask(model)
    handle = train_only(model, mask)
    values = [leaf.detach().clone() for leaf in handle.parameters()]
    model.to(torch.bfloat16)
    assert all(leaf.dtype == torch.float32 for leaf in handle.parameters())
    for leaf, value in zip(handle.parameters(), values, strict=True):
        assert torch.equal(leaf, value)
    leaves = {id(leaf) for leaf in handle.parameters()}
    assert {p.dtype for p in model.parameters() if id(p) not in leaves} == {torch.bfloat16}
    optimizer = FishSparseAdamW(model.named_parameters(), lr=1e-5, mask=mask)
    problem.loss(model, problem.batch()).backward()
    optimizer.step()
    state = model.state_dict()
    for name, leaf in handle.named_parameters():  # the weight is the leaf's rounding
        owner = name.replace("fishkern_leaves.", "")
        chosen = state[owner].flatten()[mask[owner].long()]
        assert torch.equal(chosen, leaf.detach().to(torch.bfloat16))
    problem.loss(model, problem.batch())  # a forward does not round the leaves
    moved = [leaf.detach().to(torch.bfloat16).float() for leaf in handle.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, handle.parameters(), strict=True))


def test_float64_weights_have_float64_leaves():
    model = nn.Linear(4, 4).double()
    before = model.weight.detach().clone()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    assert [leaf.dtype for leaf in handle.parameters()] == [torch.float64]
    handle.remove()
    assert torch.equal(model.weight, before)
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.1, weight_decay=0.0)
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    change = (model._parameters["weight"] - before).flatten()
    assert_matches(change[[2, 9]], torch.tensor([-0.1, -0.1]).double())
    assert change.count_nonzero() == 2
