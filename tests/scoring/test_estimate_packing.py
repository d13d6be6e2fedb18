"""Packed sequences: several samples in a row, told apart by ``sample_ids``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishkern import FisherVerificationError, estimate_fisher
from fishkern.batches.packing import Packing
from tests.support.oracle import fisher_oracle
from tests.support.problems import gpt2, ids, llama, lora, next_token_loss, quiet
from tests.support.tolerances import SCORE, assert_scores_match

LENGTHS = (5, 3, 1, 7)


def sequences(*lengths):
    """Each a batch of one, without its first label, as causal models have it."""
    texts = [ids(1, length) for length in lengths]
    for text in texts:
        yield {
            "input_ids": text,
            "position_ids": torch.arange(text.shape[1])[None],
            "labels": text.masked_fill(torch.arange(text.shape[1]) == 0, -100),
            "use_cache": False,
        }


def packed(samples):
    """End to end in one row, which transformers' models tell apart by the positions."""
    samples = list(samples)
    keys = ("input_ids", "position_ids", "labels")
    batch = {key: torch.cat([s[key] for s in samples], 1) for key in keys}
    numbers = [torch.full_like(s["labels"], n) for n, s in enumerate(samples)]
    return {**batch, "sample_ids": torch.cat(numbers, 1), "use_cache": False}


def assert_equals_oracle(model, batches, samples, **kwargs):
    scores = estimate_fisher(model, batches, progress=False, **kwargs)
    truth = fisher_oracle(model, samples, next_token_loss, list(scores))
    assert_scores_match(scores, truth)
    assert scores.num_samples == len(samples)
    return scores


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    "make", [llama, lambda: lora(llama(), ["q_proj", "down_proj"]), quiet(gpt2)]
)
def test_packed_sequences_are_exact(make, verify):
    samples, more = list(sequences(*LENGTHS)), list(sequences(2, 6))
    batches = [packed(samples), packed(more), packed(samples[:1])]
    scores = assert_equals_oracle(make(), batches, [*samples, *more, samples[0]], verify=verify)
    assert list(scores.routes.values()).count("fused") >= len(scores) - 2


class Blocks(nn.Module):
    """Attention that is told who sees whom, by a mask [B, 1, T, T]."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Embedding(50, 8), nn.Linear(8, 24), nn.LayerNorm(8)
        self.last = nn.Linear(8, 50)

    def forward(self, input_ids, mask):
        q, k, v = self.qkv(self.embed(input_ids)).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask).squeeze(1)
        return self.last(self.norm(y + v.squeeze(1)))


def token_losses(model, batch):
    logits = model(batch["input_ids"], batch["mask"])
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")


def packed_losses(model, batch):
    ids = batch["sample_ids"]
    tokens = token_losses(model, batch)
    return torch.stack([tokens[ids == n].sum() for n in range(int(ids.max()) + 1)])


def rows(*lengths_of_rows, longest=9):
    """Several rows with padding at their ends (and before, in every second one)."""
    size = (len(lengths_of_rows), longest)
    numbers, start = torch.full(size, -1), 0
    for row, lengths in enumerate(lengths_of_rows):
        column = row % 2
        for length in lengths:
            numbers[row, column : column + length] = start
            start, column = start + 1, column + length
    mask = (numbers[:, None, :, None] == numbers[:, None, None, :]) | torch.eye(longest).bool()
    text, labels = ids(*size), ids(*size)
    return {"input_ids": text, "labels": labels, "mask": mask, "sample_ids": numbers}


def alone(batch):
    for n in range(int(batch["sample_ids"].max()) + 1):
        own = batch["sample_ids"] == n
        length = int(own.sum())
        yield {
            "input_ids": batch["input_ids"][own][None],
            "labels": batch["labels"][own][None],
            "mask": torch.ones(1, 1, length, length, dtype=torch.bool),
        }


@pytest.mark.parametrize("num_samples", [None, 4])
def test_rows_with_padding_and_a_loss_of_ones_own(num_samples):
    model = Blocks()
    batches = [rows((3, 4), (1, 2, 5)), rows((9,), (2, 2))]
    scores = estimate_fisher(
        model, batches, loss_fn=packed_losses, num_samples=num_samples, progress=False
    )
    samples = [sample for batch in batches for sample in alone(batch)][:num_samples]
    truth = fisher_oracle(model, samples, lambda *a: token_losses(*a).sum(), list(scores))
    assert_scores_match(scores, truth)
    assert set(scores.routes.values()) == {"fused"}
    assert scores.num_samples == len(samples)


def test_the_last_batch_is_cut_to_the_number_of_samples():
    samples = list(sequences(*LENGTHS))
    assert_equals_oracle(llama(), [packed(samples)], samples[:3], num_samples=3)
    assert_equals_oracle(llama(), [packed(samples)], samples[:1], num_samples=1)


class Flattening(Blocks):
    """Its last layer sees tokens in one axis [B * T]: whose they are is not known there."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(50, 50)

    def forward(self, input_ids, mask):
        y = super().forward(input_ids, mask)
        return self.middle(y.flatten(0, 1)).view_as(y)


@pytest.mark.parametrize("make_batch", [lambda: rows((4, 5)), lambda: rows((3, 4), (1, 2, 5))])
def test_a_layer_that_sees_no_rows_is_scored_sample_by_sample(make_batch):
    batch, model = make_batch(), Flattening()
    scores = estimate_fisher(model, [batch], loss_fn=packed_losses, progress=False)
    truth = fisher_oracle(
        model, list(alone(batch)), lambda *a: token_losses(*a).sum(), list(scores)
    )
    assert_scores_match(scores, truth)
    routes = {name.partition(".")[0]: route for name, route in scores.routes.items()}
    assert routes.pop("middle") != "fused"
    assert set(routes.values()) == {"fused"}


def test_samples_that_see_each_other_are_found():
    batch = rows((3, 4), (1, 2, 5))
    batch["mask"] = torch.ones_like(batch["mask"])
    with pytest.raises(FisherVerificationError, match="depend on each other"):
        estimate_fisher(Blocks(), [batch], loss_fn=packed_losses, progress=False)


def test_sums_by_sample():
    model, batch = Blocks(), rows((3, 4), (1, 2, 5))
    scores = estimate_fisher(
        model, [batch], loss_fn=packed_losses, sample_scores=True, progress=False
    )
    for n, sample in enumerate(alone(batch)):
        truth = fisher_oracle(model, [sample], lambda *a: token_losses(*a).sum(), list(scores))
        total = sum(t.sum() for t in truth.values())
        assert torch.isclose(scores.sample_scores[n].double(), total, rtol=SCORE)


def test_labels_may_be_drawn():
    batch = packed(sequences(*LENGTHS))
    scores = estimate_fisher(llama(), [batch], labels="sampled", progress=False)
    assert scores.num_samples == len(LENGTHS)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.tensor([0, 1]), ValueError, r"shape \[2\]: pass \[B, T\]"),
        (torch.tensor([[0.0, 1.0]]), TypeError, r"torch.float32: pass int32 or int64"),
        ([[0, 1]], TypeError, "a list: pass"),
        (torch.tensor([[0, 2]]), ValueError, r"holds \[0, 2\]"),
        (torch.tensor([[0, -2]]), ValueError, "mark padding by -1"),
        (torch.tensor([[0, 1], [1, 2]]), ValueError, "sample 1 lies in two rows"),
    ],
)
def test_sample_ids_are_checked(wrong, error, message):
    with pytest.raises(error, match=message):
        Packing(wrong)


def test_what_cannot_be_cut_is_named():
    batch = packed(sequences(*LENGTHS))
    batch["cu_seq_lens_q"] = torch.tensor([0, 5, 8, 9, 16])
    with pytest.raises(ValueError, match=r"'cu_seq_lens_q' has shape \[5\], which cannot be cut"):
        estimate_fisher(llama(), [batch], progress=False)


def test_sample_ids_in_some_batches_only_are_refused():
    samples = list(sequences(3, 4))
    with pytest.raises(ValueError, match="in some batches only"):
        estimate_fisher(llama(), [packed(samples), samples[0]], progress=False)
