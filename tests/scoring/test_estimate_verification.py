"""What no test can foresee, ``verify`` finds: a few samples again, by plain autograd."""

import pytest
import torch
from torch import nn

from fishkern import FisherVerificationError, estimate_fisher
from fishkern.interception import linear, register_rule, rules
from tests.support.oracle import squared_error
from tests.support.tolerances import assert_scores_match

N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def score(model, *batches, **kwargs):
    return estimate_fisher(model, batches, loss_fn=squared_error, progress=False, **kwargs)


def batch(n=N):
    return torch.randn(n, T, I), torch.randn(n, T, O)


def assert_same(scores, others):
    assert_scores_match(scores, {name: other.double() for name, other in others.items()})


class Mixing(nn.Module):
    """Each sample's input less the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(I, I), nn.Linear(I, O)

    def forward(self, x):
        return self.last(self.first(x - x.mean(0)).tanh())


def test_samples_that_depend_on_each_other_are_found():
    with pytest.raises(FisherVerificationError, match="samples depend on each other"):
        score(Mixing(), batch())
    assert score(Mixing(), batch(), verify=0).num_samples == N


def test_a_first_batch_of_one_sample_does_not_hide_the_others():
    with pytest.raises(FisherVerificationError, match="samples depend on each other"):
        score(Mixing(), batch(1), batch())


class Half(nn.Linear):
    """A made-up layer type."""


class SquaresTokens(linear.LinearRule):
    def fisher_(self, *args, sample_scores=None, **kwargs):
        *rest, x, grad_out = args
        super().fisher_(*rest, x.flatten(0, 1), grad_out.flatten(0, 1))


class Forgets(linear.LinearRule):
    def fisher_(self, *args, **kwargs):
        pass


class Doubles(linear.LinearRule):
    def input_grad(self, *args):
        return 2 * super().input_grad(*args)


@pytest.mark.parametrize("rule", [SquaresTokens, Forgets, Doubles])
def test_a_wrong_rule_is_found(rule, monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    model = nn.Sequential(nn.Linear(I, I), Half(I, O))
    data = batch()
    correct = score(model, data)
    assert correct.routes["1.weight"] != "fused"
    register_rule(Half, linear.LinearRule())
    assert_same(score(model, data), correct)
    register_rule(Half, rule())
    with pytest.raises(FisherVerificationError, match=r"differ.*(0|1)\.(weight|bias) by"):
        score(model, data)
    wrong = score(model, data, verify=0)
    assert any(not torch.allclose(wrong[name], correct[name]) for name in correct)
