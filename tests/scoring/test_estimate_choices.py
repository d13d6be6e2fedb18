"""Models that choose rows by value: as many rows as samples are not always one of each."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import estimate_fisher
from fishkern.scoring.choices import Choice, KnownChoices, watching
from tests.support.oracle import assert_exact
from tests.support.problems import VOCAB, class_loss, ids, lora

T, H, C = 5, 6, 3


def by_mask(h, chosen):
    return h[chosen]


def by_flat_mask(h, chosen):
    return h.flatten(0, 1)[chosen.flatten()]


def by_positions(h, chosen):
    return h[chosen.nonzero(as_tuple=True)]


def by_flat_positions(h, chosen):
    return h.flatten(0, 1).index_select(0, torch.where(chosen.flatten())[0])


def by_select(h, chosen):
    return h.masked_select(chosen.unsqueeze(-1)).view(-1, H)


def by_lists(h, chosen):
    return torch.cat([tokens[:n] for tokens, n in zip(h, chosen.sum(1).tolist(), strict=True)])


def by_slices(h, chosen):
    return torch.cat([tokens[:n] for tokens, n in zip(h, chosen.sum(1), strict=True)])


def by_rows(h, chosen):
    rows = [h[n, t] for n in range(len(h)) for t in range(T) if bool(chosen[n, t])]
    return torch.stack(rows) if rows else h.new_zeros(0, H)


def by_repeats(h, chosen):
    own = torch.arange(T) - torch.zeros_like(chosen.sum(1)).unsqueeze(1)
    samples = h.repeat_interleave(chosen.sum(1), dim=0)
    return samples.gather(1, own[chosen].view(-1, 1, 1).expand(-1, 1, H)).squeeze(1)


def by_count(h, chosen):
    order = chosen.flatten().int().argsort(descending=True, stable=True)
    return h.flatten(0, 1)[order[: int(chosen.sum())]]


WAYS = [by_mask, by_flat_mask, by_positions, by_flat_positions, by_select, by_lists, by_slices]
WAYS += [by_rows, by_repeats, by_count]


class Gathering(nn.Module):
    """A head over the chosen tokens of all samples, with a rule, a scale and a product of weights.

    ``window``: what is chosen is not single vectors but ``[window, H]``.
    """

    def __init__(self, way, window=0):
        super().__init__()
        self.way, self.window = way, window
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, C)
        self.scale = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x, chosen):
        h = torch.tanh(self.body(x))
        if self.window:
            h = (
                h.unsqueeze(2).expand(-1, -1, self.window, -1)
                * torch.arange(1, 1 + self.window)[:, None]
            )
        h = self.way(h, chosen) * self.scale
        y = self.head(h)
        return y.tanh().sum(1) if self.window else y


def chosen_losses(model, batch):
    x, chosen, y = batch
    token = F.cross_entropy(model(x, chosen), y[chosen], reduction="none")
    return token.new_zeros(len(x)).index_add(0, chosen.nonzero()[:, 0], token)


def batch(counts):
    chosen = torch.arange(T) < torch.tensor(counts).unsqueeze(1)
    return torch.randn(len(counts), T, H), chosen, torch.randint(0, C, chosen.shape)


def check(model, counts, **kwargs):
    torch.manual_seed(0)
    batches = [batch(each) for each in counts]
    return assert_exact(
        model, batches, lambda m, b: chosen_losses(m, b).sum(), loss_fn=chosen_losses, **kwargs
    )


@pytest.mark.parametrize("way", WAYS)
def test_later_batches_may_choose_others(way):
    scores = check(Gathering(way), [[1, 1, 1, 1], [1, 1, 2, 0], [1, 1, 1, 1]])
    assert scores.routes["body.weight"] == "fused"


@pytest.mark.parametrize("way", WAYS)
def test_the_first_batch_without_verification(way):
    check(Gathering(way), [[1, 1, 2, 0], [1, 1, 1, 1]], verify=0)


def test_windows_of_tokens():
    check(Gathering(by_mask, window=3), [[1, 1, 1, 1], [1, 1, 2, 0]])


def test_as_many_of_each_sample_stay_fused():
    scores = check(Gathering(by_mask), [[1, 1, 1, 1], [1, 1, 1]])
    assert set(scores.routes.values()) == {"fused"}


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.BartForSequenceClassification(config)


def test_a_classifier_of_the_last_token_is_not_run_sample_by_sample():
    """BART finds each sample's end by a mask, one in each: nothing is to be doubted."""
    torch.manual_seed(0)
    model, batches, forwards = lora(bart(), ["q_proj"]), [], []
    for n, t in [(4, 8), (3, 6), (4, 8)]:
        tokens = ids(n, t) + 1
        tokens[:, -1] = model.config.eos_token_id
        batches.append({"input_ids": tokens.clamp(max=VOCAB - 1), "labels": torch.arange(n) % 3})
    scores = assert_exact(model, batches, class_loss, verify=0)
    assert set(scores.routes.values()) == {"fused"}
    model.get_base_model().model.encoder.register_forward_hook(lambda m, *_: forwards.append(m))
    estimate_fisher(model, batches, verify=0, progress=False)
    assert len(forwards) == 3 + 1  # one a batch, and the first sample of the first


def noted(function):
    choices = []
    with watching(choices.append):
        function()
    return choices


def test_what_is_a_choice():
    mask, h = torch.tensor([True, False, True]), torch.randn(3, 4)
    counts = torch.tensor([1, 0, 2])
    assert not noted(lambda: (h[0], h[:, 1:], h[counts], torch.where(mask, 1, 2), h[0, 0].item()))
    assert not noted(lambda: (bool(mask[0]), h.masked_fill(mask[:, None], 0.0), h.sum().item()))
    found = noted(
        lambda: (mask.nonzero(), torch.where(mask), torch.argwhere(mask), torch.nonzero(mask))
    )
    assert [choice.name for choice in found] == ["nonzero"] * 4
    found = noted(lambda: (h[mask], h[mask, 1], h[mask, :], counts.tolist(), int(counts[0])))
    assert [choice.shape for choice in found] == [(3,), (3,), (3,), (3,), ()]
    found = noted(lambda: (torch.repeat_interleave(h, counts, dim=0), torch.unique(counts)))
    assert [choice.name for choice in found] == ["repeat_interleave", "unique"]


def test_an_even_choice_is_known_by_the_axis_that_grew():
    def mask(rows):
        rows = torch.tensor(rows).bool()
        return Choice("__getitem__", tuple(rows.shape), rows, constant=True)

    known = KnownChoices()
    assert known.first_uneven([mask([[1, 0]])], 1) == 0  # never seen
    known.learn([mask([[1, 0]])], [mask([[1, 0], [0, 1]])], 2)
    assert known.first_uneven([mask([[1, 0], [1, 0]])], 2) == 1
    assert known.first_uneven([mask([[1, 1], [0, 0]])], 2) == 0
    assert known.first_uneven([mask([[1, 0], [1, 0]]), mask([[1, 0], [1, 0]])], 2) == 1
    known.learn([mask([1, 0])], [mask([1, 0])], 2)
    assert known.first_uneven([mask([1, 1])], 2) == 1  # the same tokens of all samples
