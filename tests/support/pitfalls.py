"""Ways in which a Fisher diagonal comes out wrong without a word, each with its detector.

``python -m tests.mutations`` plants each of them in the package and sees its test fail, with the
self-check of scoring switched off (``VERIFY``): the detectors do without it. Their tests are in
``tests/scoring/test_pitfalls_{sums,models,data}.py``; what they share is here.

====== ===========================================================================
number pitfall
====== ===========================================================================
01     square after the sum over samples
02     square before the sum over tokens
03     losses reduced over samples, tokens, batches, or scaled
04     squares and sums in a narrow dtype
05     a parameter with several uses: the sum of squares instead of the square of the sum
06     a use outside the module, which no rule sees
07     checkpointing: layers run twice, or get no gradient
08     dropout and batch statistics left on, buffers moved
09     the wrong sample axis, inputs without one, tokens of several samples in one axis
10     padding and ignored labels
11     stale or half state
12     labels of the data against labels drawn from the model
13     labels drawn per batch instead of per sample
14     token sums split before the square, what lies outside the operands, narrow products
15     several processes: averages, unequal numbers of samples, shards
16     tensors changed in place after their use, gradients with unusual strides
17     autocast: inputs kept before their cast
18     tuning on the live accumulator
19     a fresh adapter's zeros taken for scores
20     a value that depends on the route
====== ===========================================================================
"""

import torch
from torch import nn

from fishkern import estimate_fisher
from fishkern.interception import rules
from fishkern.scoring import squares
from tests.support.oracle import assert_exact, squared_error
from tests.support.tolerances import assert_scores_match

VERIFY = 0
N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def score(model, *batches, loss_fn=squared_error, **kwargs):
    """``estimate_fisher`` without the self-check."""
    kwargs = {"verify": VERIFY, "progress": False, **kwargs}
    return estimate_fisher(model, batches, loss_fn=loss_fn, **kwargs)


def exact(model, batches, *args, **kwargs):
    """``assert_exact`` without the self-check."""
    return assert_exact(model, batches, *args, **{"verify": VERIFY, **kwargs})


def network():
    """Linear layers and a norm."""
    return nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, O))


def batch(n=N, t=T, i=I, o=O):
    """x [N, T, I] and y [N, T, O]."""
    return torch.randn(n, t, i), torch.randn(n, t, o)


def assert_same(scores, others):
    """Two models' scores, or one's in two ways, are equal up to rounding."""
    assert_scores_match(scores, {name: other.double() for name, other in others.items()})


def assert_sums_to_the_gradient(monkeypatch, model, data, loss_fn=squared_error):
    """With the squares left out everywhere, scores are the ordinary gradient over N.

    One checksum for uses that are missed, counted twice, or taken from the wrong place.
    """

    def sums(self, module, fishers, x, grad_out, **_):
        for name, fisher in fishers.items():
            fisher += self.param_grad(module, name, x, grad_out)

    def add(self, *args):
        *_, name, grad = args
        self.scores[name] += grad

    with monkeypatch.context() as patch:
        for rule in set(rules._RULES.values()):
            patch.setattr(type(rule), "fisher_", sums)
        patch.setattr(squares.Squares, "add_grad", add)
        sums = score(model, data, loss_fn=loss_fn, verify=0)
    losses = loss_fn(model.eval(), data)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(losses.mean(), list(params.values()))
    assert_same(sums, dict(zip(params, grads, strict=True)))
