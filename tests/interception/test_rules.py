"""What register_rule accepts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fishkern
from fishkern.interception.rules import _RULES
from tests.support.oracle import assert_exact


class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features))

    def forward(self, x):
        return x * self.weight


class ScaleRule(fishkern.Rule):
    params = ("weight",)

    def sample_grads(self, module, x, grad_out):
        return {"weight": (grad_out * x).sum(1)}


class Old(ScaleRule):
    def fisher_(self, module, fishers, x, grad_out):
        fishers["weight"] += (grad_out * x).sum(1).square().sum(0)


class Whole(ScaleRule):
    def fisher_(self, module, fishers, x, grad_out, **sums):
        super().fisher_(module, fishers, x, grad_out, **sums)


class Half(ScaleRule):
    def fisher_(self, module, fishers, x, grad_out, sample_scores=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("rule", "missing"),
    [(Old(), "no sample_scores and no masks"), (Half(), "no masks"), (Old, "instance of a sub")],
)
def test_a_rule_that_scoring_cannot_call_is_refused_at_once(rule, missing):
    before = dict(_RULES)
    with pytest.raises(TypeError, match=missing):
        fishkern.register_rule(Scale, rule)
    assert before == _RULES


@pytest.mark.parametrize("rule", [ScaleRule(), Whole()])
def test_a_rule_of_ones_own(rule, monkeypatch):
    monkeypatch.setattr("fishkern.interception.rules._RULES", dict(_RULES))
    fishkern.register_rule(Scale, rule)
    torch.manual_seed(0)
    model = nn.Sequential(Scale(4), nn.Linear(4, 3))
    batch = (torch.randn(5, 4), torch.randint(0, 3, (5,)))

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    scores = assert_exact(
        model, [batch], lambda m, b: losses(m, b).sum(), loss_fn=losses, sample_scores=True
    )
    assert scores.routes["0.weight"] == "fused"
    assert scores.reasons == {}
