"""Each sample's gradients are counted for it, in whatever order a model or a loss puts them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishkern import estimate_fisher
from fishkern.scoring.placement import misplaced, sample_weights
from tests.support.oracle import assert_exact, sample_oracle
from tests.support.tolerances import assert_matches

T, H, C = 5, 6, 3


class Sorting(nn.Module):
    """Runs its samples in another order than they come in, like a model that packs by length."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(H, H), nn.Parameter(torch.randn(H))
        self.last = nn.Linear(H, C)

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        h = torch.tanh(self.first(x[order]) * self.scale)
        return self.last(h.mean(1))[order.argsort()]


class Chosen(nn.Module):
    """A head over the chosen tokens of all samples, as masked language models have."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, C)

    def forward(self, x, chosen):
        return self.head(torch.tanh(self.body(x))[chosen])


def class_losses(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def chosen_losses(model, batch):
    x, chosen, y = batch
    token = F.cross_entropy(model(x, chosen), y[chosen], reduction="none")
    return token.new_zeros(len(x)).index_add(0, chosen.nonzero()[:, 0], token)


def pair_losses(model, batch):
    """Two views of each sample, all first ones before all second ones."""
    x, _ = batch
    one, other = model(torch.cat([x, 2 * x.flip(1)])).chunk(2)
    return (one - other).square().sum(1)


def test_samples_that_the_model_sorts_keep_their_own_sums():
    torch.manual_seed(0)
    model, batch = Sorting().eval(), (torch.randn(4, T, H), torch.randint(0, C, (4,)))
    scores = estimate_fisher(
        model, [batch], loss_fn=class_losses, sample_scores=True, progress=False
    )
    squares = sample_oracle(model, [batch], lambda m, b: class_losses(m, b).sum(), list(scores))
    truth = sum(each.flatten(1).sum(1) for each in squares.values())
    assert_matches(scores.sample_scores, truth, terms=1000)


def test_two_views_one_behind_the_other_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Flatten(), nn.Linear(T * H, C))
    batches = [(torch.randn(n, T, H), torch.randint(0, C, (n,))) for n in (4, 3)]
    assert_exact(model, batches, lambda m, b: pair_losses(m, b).sum(), loss_fn=pair_losses)


@pytest.mark.parametrize("counts", [[1, 1, 2, 0], [1, 1, 1, 1], [1, 0, 0, 3]])
def test_a_list_of_as_many_tokens_as_samples_is_exact(counts):
    torch.manual_seed(0)
    n = len(counts)
    chosen = torch.arange(T) < torch.tensor(counts).unsqueeze(1)
    batch = (torch.randn(n, T, H), chosen, torch.randint(0, C, (n, T)))
    scores = assert_exact(
        Chosen(), [batch], lambda m, b: chosen_losses(m, b).sum(), loss_fn=chosen_losses
    )
    assert scores.routes["body.weight"] == "fused"
    assert scores.routes["head.weight"] == ("fused" if counts == [1, 1, 1, 1] else "loop")
    assert ("head.weight" in scores.reasons) == (counts != [1, 1, 1, 1])


def test_each_samples_squares_follow_its_own_weight():
    weights = sample_weights(torch.zeros(5))
    assert len(weights.unique()) == 5
    assert weights.min() >= 1
    plain = {("a", "b"): torch.rand(5) + 1, ("noise",): torch.full((5,), 1e-9)}
    right = {names: sums * weights**2 for names, sums in plain.items()}
    entries = {"a": 1, "b": 1, "noise": 1}
    right[("noise",)] = right[("noise",)].flip(0)
    assert misplaced(plain, right, weights, entries, 1e-3) == set()
    wrong = {**right, ("a", "b"): plain["a", "b"] * weights.roll(1) ** 2}
    assert misplaced(plain, wrong, weights, entries, 1e-3) == {"a", "b"}
    assert misplaced(plain, {}, weights, entries, 1e-3) == {"a", "b"}


class Substituting(nn.Module):
    """Runs a layer with other tensors in the place of its parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(H, C), nn.Parameter(torch.randn(C))

    def forward(self, x):
        values = {"weight": self.layer.weight * 2, "bias": self.shift}
        return torch.func.functional_call(self.layer, values, (x,)).sum(1)


def test_other_tensors_in_the_place_of_parameters_are_exact():
    torch.manual_seed(0)
    batch = (torch.randn(4, T, H), torch.randint(0, C, (4,)))
    assert_exact(
        Substituting(),
        [batch],
        lambda m, b: class_losses(m, b).sum(),
        loss_fn=class_losses,
        verify=0,
    )
