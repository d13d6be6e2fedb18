"""Parameters that only their module knows what to do with: it is run again, sample by sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import SparseMask, estimate_fisher
from tests.support.oracle import fisher_oracle
from tests.support.tolerances import SCORE, assert_scores_match

N, T, H = 5, 4, 6


class Product(nn.Module):
    """A weight made of two factors, in containers that are never called."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict({"a": torch.randn(H, 2), "b": torch.randn(2, H)})

    def forward(self, x):
        return F.linear(x, self.factors["a"] @ self.factors["b"])


class Legacy(torch.autograd.Function):
    """In the old style, for which vmap has no rule."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.T, a.T @ grad


class Stubborn(Product):
    def forward(self, x):
        return F.linear(x, Legacy.apply(self.factors["a"], self.factors["b"]))


class Net(nn.Module):
    def __init__(self, middle, times=1, reentrant=None):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(H, H), middle, nn.Linear(H, 3)
        self.times, self.reentrant = times, reentrant

    def forward(self, x):
        x = self.first(x).tanh()
        for _ in range(self.times):
            if self.reentrant is None:
                x = self.middle(x)
            else:
                x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


def losses(model, batch):
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(1)


def batches(count=2):
    return [(torch.randn(n, T, H), torch.randn(n, T, 3)) for n in (N, 3)[:count]]


def assert_exact(model, data, **options):
    scores = estimate_fisher(model, data, loss_fn=losses, progress=False, **options)
    wide = [tuple(tensor.double() for tensor in batch) for batch in data]
    names = list(scores)
    truth = fisher_oracle(model.double(), wide, lambda m, b: losses(m, b).sum(), names)
    assert_scores_match(scores, truth)
    return scores


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_product_of_parameters(times, reentrant, verify):
    torch.manual_seed(0)
    scores = assert_exact(Net(Product(), times, reentrant), batches(), verify=verify)
    assert scores.routes["middle.factors.a"] == scores.routes["middle.factors.b"] == "vmap"
    assert scores.routes["first.weight"] == scores.routes["last.weight"] == "fused"
    why = dict.fromkeys(["middle.factors.a", "middle.factors.b"], "no rule covers its Product")
    assert scores.reasons == why


def test_what_vmap_cannot_do_runs_sample_by_sample():
    torch.manual_seed(0)
    scores = assert_exact(Net(Stubborn()), batches())
    assert scores.routes["middle.factors.a"] == "loop"
    reason = scores.reasons["middle.factors.a"]
    assert reason.startswith("no rule covers its Stubborn, which cannot be run for all samples at")
    assert "autograd.Function" in reason  # functorch's own words


def test_only_once_for_each_batch():
    """The model itself does not run once for each sample, only the module does."""
    torch.manual_seed(0)
    model, calls = Net(Product()), []
    model.first.register_forward_hook(lambda *_: calls.append(None))
    data = [(torch.randn(8, T, H), torch.randn(8, T, 3)) for _ in range(3)]
    estimate_fisher(model, data, loss_fn=losses, progress=False, verify=0)
    # the first batch twice, as it is only seen there what the parameters need; each with a probe
    assert len(calls) == 3 + 1 + 2


def test_a_weight_with_a_rule_inside():
    """What has a rule stays with it, and is not counted twice."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mix = nn.Linear(H, H), nn.Parameter(torch.randn(H, H))

        def forward(self, x):
            return self.inner(x) @ self.mix

    torch.manual_seed(0)
    scores = assert_exact(Net(Around()), batches())
    assert scores.routes["middle.mix"] == "vmap"
    assert scores.routes["middle.inner.weight"] == "fused"


def test_sums_by_sample():
    torch.manual_seed(0)
    model, data = Net(Product()), batches()
    mask = SparseMask({"middle.factors.a": torch.tensor([0, 3])}, {"middle.factors.a": (H, 2)})
    scores = estimate_fisher(model, data, loss_fn=losses, progress=False, sample_scores=mask)
    found = scores.sample_scores
    model.double()
    expected = []
    for x, y in data:
        for n in range(len(x)):
            loss = losses(model, (x[n : n + 1].double(), y[n : n + 1].double())).sum()
            (grad,) = torch.autograd.grad(loss, model.middle.factors["a"])
            expected.append(grad.flatten()[[0, 3]].square().sum())
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=SCORE, atol=0)


def test_an_error_in_the_pass_leaves_the_model_as_it_was():
    model, calls = Net(Product()), []
    classes = [type(module) for module in model.modules()]

    def failing(model, batch):
        calls.append(None)
        if len(calls) == 5:
            raise KeyError("mine")
        return losses(model, batch)

    with pytest.raises(KeyError, match="mine"):
        estimate_fisher(model, batches() * 3, loss_fn=failing, progress=False, verify=0)
    assert [type(module) for module in model.modules()] == classes
    assert all("_fishkern_rerun" not in vars(module) for module in model.modules())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
