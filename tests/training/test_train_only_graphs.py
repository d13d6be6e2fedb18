"""Attached models under torch.compile, torch.func and checkpointing: the same gradients."""

import torch
from torch import nn

from fishkern import SparseMask, train_only


def test_functional_call_leaves_the_leaves_alone():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    before = leaf.detach().clone()
    torch.func.functional_call(model, {"weight": torch.zeros(4, 4)}, (torch.ones(1, 4),))
    assert torch.equal(leaf, before)
