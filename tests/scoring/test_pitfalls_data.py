"""Pitfalls of the data: padding, labels, ranks, and adapters that have seen none."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishkern import FisherDiagonal, select
from tests.support.oracle import fisher_oracle, squared_error
from tests.support.pitfalls import I, N, O, T, assert_same, batch, exact, network, score
from tests.support.problems import (
    PROBLEMS,
    SAMPLES,
    TOKENS,
    bert,
    class_loss,
    classes,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def test_pitfall_10_ignored_labels_and_padding_tokens():
    problem = PROBLEMS["llama-untied"]
    model, data = problem.model(), problem.batch()
    scores = exact(model, [data], problem.loss)
    other = {**data, "input_ids": data["input_ids"].masked_fill(data["attention_mask"] == 0, 7)}
    assert_same(score(model, other, loss_fn=None), scores)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_10_longer_padding(side):
    problem = PROBLEMS["bert-tokens"]
    model, data = problem.model(), problem.batch()
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    pads = (3, 0) if side == "left" else (0, 3)
    longer = {key: F.pad(value, pads, value=fill[key]) for key, value in data.items()}
    if side == "left":  # positions must stay those of the tokens
        longer["position_ids"] = (torch.arange(TOKENS + 3) - 3).clamp(min=0).repeat(SAMPLES, 1)
    assert_same(score(model, longer, loss_fn=None), score(model, data, loss_fn=None))


def test_pitfall_10_the_row_of_a_padding_index():
    model = nn.Sequential(nn.Embedding(7, I, padding_idx=2), nn.Linear(I, O))
    data = torch.randint(7, (N, T)), torch.randn(N, T, O)
    data[0][:, 0] = 2
    scores = score(model, data)
    assert not scores["0.weight"][2].count_nonzero()
    truth = fisher_oracle(model, [data], lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


class Ranks:
    """``all_reduce`` among ranks that run one after the other; the last one has the result."""

    def __init__(self, monkeypatch, size):
        self.size, self.rank, self.given, self.call = size, -1, [], 0
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: self.rank)

    def next(self):
        """The process group, seen by the next rank."""
        self.rank, self.call = self.rank + 1, 0
        return self

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        assert group is self
        if self.call == len(self.given):
            self.given.append(torch.zeros_like(tensor))
        self.given[self.call] += tensor
        tensor.copy_(self.given[self.call])
        if op == torch.distributed.ReduceOp.AVG:
            tensor /= self.size
        self.call += 1


class Logits(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(I, num_classes)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def test_pitfall_12_softmax_regression_in_closed_form():
    model, x, y = Logits(4), torch.randn(N, I), torch.randint(4, (N,))
    p = model(x).logits.softmax(1).detach().double()
    squares = {"empirical": (p - F.one_hot(y, 4)).square(), "expected": p * (1 - p)}
    for labels, square in squares.items():
        scores = score(model, {"x": x, "labels": y}, loss_fn=None, labels=labels)
        expected = torch.einsum("no,ni->oi", square, x.double().square()) / N
        assert_matches(scores["layer.weight"], expected, terms=N)
        assert_matches(scores["layer.bias"], square.mean(0), terms=N)
        assert scores.labels == labels


def test_pitfall_13_each_sample_draws_its_own_label():
    model, x = Logits(3), torch.randn(1, I)
    exact = score(model, {"x": x}, loss_fn=None, labels="expected")
    drawn = score(model, {"x": x.repeat(3000, 1)}, loss_fn=None, labels="sampled")
    for name in exact:
        # 3000 draws scatter by a few per cent.
        assert torch.allclose(drawn[name], exact[name], rtol=0.1)


def test_pitfall_13_ranks_with_equal_seeds_draw_differently(monkeypatch):
    model, data = Logits(3), {"x": torch.randn(50, I)}
    ranks = Ranks(monkeypatch, 2)
    first, both = (
        score(model, data, loss_fn=None, labels="sampled", process_group=ranks.next())
        for _ in range(2)
    )
    assert not torch.equal(first["layer.bias"], both["layer.bias"])


def test_pitfall_15_ranks_with_unequal_numbers_of_samples(monkeypatch):
    model, data = network(), [batch(3), batch(2), batch(1)]
    ranks = Ranks(monkeypatch, len(data))
    scores = [score(model, part, process_group=ranks.next()) for part in data]
    assert scores[-1].num_samples == 6
    assert_same(scores[-1], score(model, *data))


def test_pitfall_15_shards_are_refused():
    model = nn.Linear(I, O)
    model.weight.placements = ()  # as a DTensor has them
    with pytest.raises(ValueError, match=r"'weight' is sharded"):
        score(model, batch())


def test_pitfall_19_a_fresh_adapter_has_no_information_in_a():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(bert(), config)
    scores = exact(model, [classes()], class_loss)
    for name, value in scores.items():
        assert bool(value.count_nonzero()) is ("lora_B" in name)
    with pytest.warns(UserWarning, match="all scores are zero in 2 of 4 tensors: .*lora_A"):
        select(scores, k=4)


def test_pitfall_19_zeros_that_fill_the_budget_are_named():
    scores = FisherDiagonal({"weight": torch.tensor([0.0, 1.0, 0.0])}, num_samples=1)
    with pytest.warns(UserWarning, match="1 of the 2 selected entries have a score of zero"):
        select(scores, k=2)
