"""select_ird takes labels and keep as estimate_fisher and select do."""

import pytest
import torch
from torch import nn

from fishkern import estimate_fisher, select_ird
from tests.scoring.test_ird import (
    WAYS,
    Net,
    assert_pairs,
    batches,
    brute_force,
    dict_of,
    flat_squares,
    ird,
    summed,
)
from tests.support.problems import PROBLEMS, bert, classes, lora

pytestmark = pytest.mark.filterwarnings("ignore:.*have a score of zero:UserWarning")
TARGETS = {"density": 0.1, "num_samples": 4, "rounds": 2}


@pytest.fixture(params=WAYS)
def way(request):
    return {"cache_bytes": WAYS[request.param]}


def test_what_is_kept_is_whole_in_every_mask_and_not_ranked(way):
    torch.manual_seed(0)
    model, samples = Net(), batches()
    result = ird(model, samples, keep="head.*", **way)
    everything = {name: param.shape for name, param in model.named_parameters()}
    assert result.mask.shapes == everything
    for step in result.trace:
        for name in ("head.weight", "head.bias"):
            assert step.mask[name].tolist() == list(range(everything[name].numel()))
    ranked = [name for name in everything if not name.startswith("head.")]
    alone = ird(model, samples, params=ranked, **way)
    assert len(alone.trace) == len(result.trace)
    for step, other in zip(result.trace, alone.trace, strict=True):
        assert step.samples.tolist() == other.samples.tolist()
        for name in ranked:
            assert step.mask[name].tolist() == other.mask[name].tolist()
    squares = flat_squares(model, samples, summed, ranked)
    pairs = brute_force(squares, density=0.1, num_samples=6, rounds=3)
    assert_pairs(alone, pairs)
    heads = everything["head.weight"].numel() + everything["head.bias"].numel()
    assert result.mask.num_selected == round(0.1 * squares.shape[1]) + heads


def expected_squares(model, samples, names):
    """``sum_c p_c (grad log p_c)^2`` of each sample, by plain autograd in float64."""
    model, rows = model.double(), []
    params = [dict(model.named_parameters())[name] for name in names]
    for batch in samples:
        for n in range(len(batch["labels"])):
            one = {key: value[n : n + 1] for key, value in batch.items() if key != "labels"}
            logs = model(**one).logits.log_softmax(1)[0]
            row = 0.0
            for log in logs:
                grads = torch.autograd.grad(log, params, retain_graph=True)
                flat = torch.cat([grad.flatten() for grad in grads])
                row = row + log.exp().detach() * flat.square()
            rows.append(row)
    model.float()
    return torch.stack(rows)


def test_expected_labels_equal_brute_force(way):
    torch.manual_seed(0)
    model = lora(bert(), ["query"]).eval()
    samples = [classes(n) for n in (5, 3)]
    result = select_ird(model, samples, **TARGETS, labels="expected", progress=False, **way)
    assert_pairs(result, brute_force(expected_squares(model, samples, result.mask), **TARGETS))


def test_sampled_labels_are_drawn_once_for_all_rounds(way):
    torch.manual_seed(0)
    model = PROBLEMS["bert-lora"].model().eval()
    samples = [classes(n) for n in (5, 3)]
    drawn = [select_with(model, samples, seed, way) for seed in (1, 1, 2)]
    assert drawn[0].samples.tolist() == drawn[1].samples.tolist()
    assert dict_of(drawn[0].mask) == dict_of(drawn[1].mask)
    assert dict_of(drawn[0].mask) != dict_of(drawn[2].mask)
    scores = estimate_fisher(
        model, samples, labels="sampled", sample_scores=True, progress=False,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    best = scores.sample_scores.topk(5).indices.sort().values
    first = select_with(model, samples, 1, way, shrink_samples=5 / 8).trace[1]
    assert first.samples.tolist() == best.tolist()


def select_with(model, samples, seed, way, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    options = {"labels": "sampled", "generator": generator, "progress": False}
    return select_ird(model, samples, **TARGETS, **options, **way, **kwargs)


def test_wrong_options_are_refused():
    model, samples = Net(), batches()
    with pytest.raises(ValueError, match="labels is 'expected', but loss_fn chooses its own"):
        ird(model, samples, labels="expected")
    with pytest.raises(ValueError, match="labels is 'true': choose one of"):
        ird(model, samples, labels="true")
    with pytest.raises(TypeError, match="generator is 3"):
        ird(model, samples, generator=3)
    with pytest.raises(ValueError, match="keep"):
        ird(model, samples, keep="nothing.*")
    with pytest.raises(ValueError, match=r"keep is '\*', which leaves no candidate"):
        ird(model, samples, keep="*")
    assert all(isinstance(param, nn.Parameter) for param in model.parameters())
