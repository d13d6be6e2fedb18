"""Sums by sample equal those of float64 one-sample gradients, over all entries or any mask."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import fishkern
from fishkern import SparseMask, estimate_fisher, select
from tests.support.oracle import sample_oracle, squared_error
from tests.support.problems import PROBLEMS, bert, language, lora, next_token_loss
from tests.support.tolerances import SCORE, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

I, O, T = 3, 2, 5  # input and output features, tokens  # noqa: E741


def score(model, batches, **kwargs):
    return estimate_fisher(model, batches, progress=False, **kwargs)


def some_entries(scores):
    """A mask with a third of the entries, all of the first tensor and none of the last."""
    chosen = {name: torch.rand(s.numel()) < 0.3 for name, s in scores.items()}
    names = list(chosen)
    chosen[names[0]][:], chosen[names[-1]][:] = True, False
    indices = {name: hit.nonzero().flatten() for name, hit in chosen.items()}
    return SparseMask(indices, {name: s.shape for name, s in scores.items()})


def assert_sums_match(model, batches, loss, mask=None, **kwargs):
    """Scores with sums by sample, compared with the oracle; ``loss`` sums over the samples."""
    scores = score(model, batches, sample_scores=True if mask is None else mask, **kwargs)
    squares = sample_oracle(model, batches, loss, list(scores))
    assert_scores_match(scores, {name: s.mean(0) for name, s in squares.items()})
    truth = sum(
        (s if mask is None else s * mask.dense(name)).flatten(1).sum(1)
        for name, s in squares.items()
        if mask is None or name in mask
    )
    found = scores.sample_scores
    assert found.dtype == torch.float32
    assert found.shape == truth.shape == (scores.num_samples,)
    assert truth.min() > 0
    assert ((found - truth).abs() / truth).max() < SCORE
    return scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_real_models(name, masked):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(3), problem.batch(2, 4)]
    mask = some_entries(score(model, batches)) if masked else None
    assert_sums_match(model, batches, problem.loss, mask)


@pytest.mark.parametrize("name", ["bert-lora", "gpt2"])
def test_every_backend(name, backend):
    problem = PROBLEMS[name]
    model, batch = problem.model(), problem.batch()
    assert_sums_match(model, [batch], problem.loss, some_entries(score(model, [batch])))


def test_scores_do_not_depend_on_it_and_it_is_none_where_not_asked_for():
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch()
    plain, both = score(model, [batch]), score(model, [batch], sample_scores=True)
    assert plain.sample_scores is None
    assert_scores_match(plain, both)
    assert plain.routes == both.routes


def test_a_mask_of_some_tensors_only():
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch()
    scores = score(model, [batch])
    part = {name: s for name, s in scores.items() if "query" in name}
    assert_sums_match(model, [batch], problem.loss, select(part, density=0.5))


def test_longer_padding_changes_nothing():
    problem = PROBLEMS["gpt2-lora"]
    model, batch = problem.model(), language(side="left")
    values = {"input_ids": 1, "attention_mask": 0, "position_ids": 0, "labels": -100}
    longer = {k: nn.functional.pad(v, (4, 0), value=values[k]) for k, v in batch.items()}
    one = assert_sums_match(model, [batch], next_token_loss)
    other = score(model, [longer], sample_scores=True)
    torch.testing.assert_close(one.sample_scores, other.sample_scores, rtol=SCORE, atol=0)


class Net(nn.Module):
    """Parameters of no layer, one layer that is used twice, and one that is used functionally."""

    def __init__(self):
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.randn(I)), nn.Parameter(torch.randn(I, I))
        self.twice, self.past = nn.Linear(I, I), nn.Linear(I, I)

    def forward(self, x):
        x = self.twice(self.twice(x * self.scale).tanh()) @ self.mix.matrix_exp()
        return linear(self.past(x).tanh(), self.past.weight)


class Images(nn.Module):
    """Convolutions, one by groups, and a norm between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 4, 3, stride=2, groups=2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


@pytest.mark.parametrize("masked", [False, True])
def test_loops_and_several_uses(masked):
    model, batches = Net(), [(torch.randn(n, T, I), torch.randn(n, T, I)) for n in (1, 4, 2)]
    mask = some_entries(score(model, batches, loss_fn=squared_error)) if masked else None
    scores = assert_sums_match(
        model, batches, lambda *a: squared_error(*a).sum(), mask, loss_fn=squared_error
    )
    assert scores.routes["mix"] == "loop"
    assert scores.routes["twice.weight"] == "fused"


@pytest.mark.parametrize("masked", [False, True])
def test_convolutions(masked):
    model = Images()
    batches = [(torch.randn(n, 2, 7, 7), torch.randn(n, 4, 3, 3)) for n in (3, 2)]
    mask = some_entries(score(model, batches, loss_fn=squared_error)) if masked else None
    scores = assert_sums_match(
        model, batches, lambda *a: squared_error(*a).sum(), mask, loss_fn=squared_error
    )
    assert set(scores.routes.values()) == {"fused"}


@pytest.mark.parametrize("masked", [False, True])
def test_dora(masked):
    model, problem = lora(bert(), ["query", "dense"], use_dora=True), PROBLEMS["bert"]
    batch = problem.batch()
    mask = some_entries(score(model, [batch])) if masked else None
    assert_sums_match(model, [batch], problem.loss, mask)


class Segments(nn.Module):
    """A layer in two checkpointed segments, then used functionally: reported use by use."""

    def __init__(self):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(I, I), True

    def forward(self, x):
        x = linear(x, self.layer.weight).tanh().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.reentrant).tanh()
        return x


@pytest.mark.parametrize("verify", [0, 2])
def test_a_use_that_is_found_late_counts_once(verify):
    def loss(model, batch):
        model.reentrant = False  # plain autograd.grad refuses it
        return squared_error(model, batch).sum()

    batch = torch.randn(4, T, I), torch.randn(4, T, I)
    scores = assert_sums_match(Segments(), [batch], loss, loss_fn=squared_error, verify=verify)
    assert scores.routes["layer.weight"] == "loop"


def test_samples_are_those_that_were_counted():
    problem = PROBLEMS["bert"]
    model, batches = problem.model(), [problem.batch(3), problem.batch(4)]
    cut = score(model, batches, num_samples=5, sample_scores=True).sample_scores
    whole = score(model, batches, sample_scores=True).sample_scores
    torch.testing.assert_close(cut, whole[:5], rtol=SCORE, atol=0)


def test_scores_on_another_device_than_the_parameters():
    """As far as one device can tell: both are the CPU, asked for by name."""
    problem = PROBLEMS["bert-lora"]
    model, batch = problem.model(), problem.batch()
    mask = some_entries(score(model, [batch]))
    assert_sums_match(model, [batch], problem.loss, mask, score_device="cpu")


def test_a_mask_that_does_not_fit_is_refused():
    model = nn.Linear(I, O)
    batch = torch.randn(4, I), torch.randn(4, O)
    index = torch.tensor([0])

    def refused(error, match, sample_scores, **kwargs):
        with pytest.raises(error, match=match):
            score(model, [batch], loss_fn=squared_error, sample_scores=sample_scores, **kwargs)
        assert model.weight.grad is None

    refused(TypeError, "sample_scores is a str: pass True", "yes")
    stranger = SparseMask({"wieght": index}, {"wieght": (O, I)})
    refused(ValueError, "'wieght', which is not scored; close to it: 'weight'", stranger)
    known = SparseMask({"weight": index}, {"weight": (O, I)})
    refused(ValueError, "'weight', which is not scored", known, params="bias")
    other = SparseMask({"weight": index}, {"weight": (I, O)})
    refused(ValueError, r"in shape \[3, 2\], the model in \[2, 3\]", other)
    with fishkern.use_backend("reference"):
        assert score(model, [batch], loss_fn=squared_error, sample_scores=known)
