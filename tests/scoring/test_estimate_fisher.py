"""Scores of real model classes equal one-sample float64 autograd, whatever the batches."""

import pytest
import torch

from fishkern import FisherDiagonal, estimate_fisher
from tests.support.oracle import assert_exact, fisher_oracle, one_sample
from tests.support.problems import PROBLEMS, TOKENS, language, llama, next_token_loss
from tests.support.tolerances import assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def score(model, batches, **kwargs):
    return estimate_fisher(model, batches, progress=False, **kwargs)


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


def test_scores_are_exact(problem):
    model = problem.model()
    scores = assert_exact(model, [problem.batch()], problem.loss)
    assert isinstance(scores, FisherDiagonal)
    assert list(scores) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert {s.dtype for s in scores.values()} == {torch.float32}
    assert scores.labels == "empirical"
    for part in problem.fused:
        routes = {route for name, route in scores.routes.items() if part in name}
        assert routes == {"fused"}, part


def test_every_weight_of_a_frozen_model_can_be_a_candidate(problem):
    model = problem.model().requires_grad_(False)
    scores = assert_exact(model, [problem.batch()], problem.loss, params="*")
    assert list(scores) == [name for name, _ in model.named_parameters()]


def test_as_many_samples_as_tokens(problem):
    assert_exact(problem.model(), [problem.batch(TOKENS, TOKENS)], problem.loss)


def test_one_sample(problem):
    assert assert_exact(problem.model(), [problem.batch(1)], problem.loss).num_samples == 1


def test_a_first_batch_of_one_sample_and_larger_ones_after_it(problem):
    batches = [problem.batch(1), problem.batch(3, TOKENS - 2), problem.batch(2, TOKENS)]
    assert assert_exact(problem.model(), batches, problem.loss).num_samples == 6


def test_batches_of_different_sizes_and_lengths(problem):
    batches = [problem.batch(3, 5), problem.batch(5, 3), problem.batch(1, 7), problem.batch(4, 4)]
    assert assert_exact(problem.model(), batches, problem.loss).num_samples == 13


@pytest.mark.parametrize("name", ["bert-lora", "gpt2-lora"])
def test_every_backend_is_exact(name, backend):
    problem = PROBLEMS[name]
    assert_exact(problem.model(), [problem.batch()], problem.loss)


def test_one_batch_equals_its_samples_in_several(problem):
    model, batch = problem.model(), problem.batch(5)
    whole = score(model, [batch])
    truth = fisher_oracle(model, [batch], problem.loss, list(whole))
    parts = [{k: v[a:b] for k, v in batch.items()} for a, b in [(0, 2), (2, 3), (3, 5)]]
    for batches in ([batch], parts, [one_sample(batch, n) for n in range(5)]):
        scores = score(model, batches)
        assert scores.num_samples == 5
        assert_scores_match(scores, truth)


@pytest.mark.parametrize("verify", [0, 1, 2, 100])
def test_verify_changes_nothing(verify):
    problem = PROBLEMS["llama-tied"]
    model, batch = problem.model(), problem.batch()
    assert score(model, [batch], verify=verify) == score(model, [batch])


def test_num_samples_cuts_a_mapping():
    problem = PROBLEMS["bert"]
    model, batches = problem.model(), [problem.batch(3) for _ in range(3)]
    seen = []

    def watched():
        for batch in batches:
            seen.append(batch)
            yield batch

    scores = score(model, watched(), num_samples=5)
    assert scores.num_samples == 5
    assert len(seen) == 2  # the third batch was not even asked for
    cut = [batches[0], {key: value[:2] for key, value in batches[1].items()}]
    assert_scores_match(scores, fisher_oracle(model, cut, problem.loss, list(scores)))


def test_num_samples_may_end_on_a_boundary():
    problem = PROBLEMS["bert"]
    batches = [problem.batch(3) for _ in range(3)]
    model = problem.model()
    assert score(model, batches, num_samples=6) == score(model, batches[:2])


def test_fewer_samples_than_asked_for_warn():
    problem = PROBLEMS["bert"]
    with pytest.warns(UserWarning, match="num_samples is 9, but batches ended after 3"):
        scores = score(problem.model(), [problem.batch(3)], num_samples=9)
    assert scores.num_samples == 3


def padded(batch, pads, side):
    """The same sentences with more padding."""
    values = {"input_ids": 1, "attention_mask": 0, "position_ids": 0, "labels": -100}
    shape = (pads, 0) if side == "left" else (0, pads)
    return {
        key: torch.nn.functional.pad(value, shape, value=values[key])
        for key, value in batch.items()
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "llama-untied", "gpt2-lora"])
def test_longer_padding_changes_no_score(name, side):
    problem = PROBLEMS[name]
    model, batch = problem.model(), language(side=side)
    scores = assert_exact(model, [batch], problem.loss)
    longer = score(model, [padded(batch, 5, side)])
    truth = fisher_oracle(model, [batch], problem.loss, list(scores))
    assert_scores_match(longer, truth)


def test_the_order_of_samples_does_not_matter():
    problem = PROBLEMS["t5"]
    model, batch = problem.model(), problem.batch(5)
    turned = {key: value.flip(0) for key, value in batch.items()}
    scores = score(model, [batch])
    assert_scores_match(score(model, [turned]), {n: s.double() for n, s in scores.items()})


def test_a_batch_encoding_is_a_mapping():
    from transformers import BatchEncoding

    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch(5)
    encoded = BatchEncoding(batch)
    assert score(model, [encoded], num_samples=3) == score(model, [batch], num_samples=3)
    assert score(model, [encoded], num_samples=3, loss_fn=bert_losses).num_samples == 3


def bert_losses(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def test_values_shared_by_all_samples_are_passed_on():
    model = llama()
    batch = language()
    batch["position_ids"] = torch.arange(TOKENS).unsqueeze(0)
    batch["use_cache"] = False
    assert_exact(model, [batch], next_token_loss)


def test_position_ids_of_one_row_at_one_sample_per_token():
    model = llama()
    batch = language(TOKENS)
    batch["position_ids"] = torch.arange(TOKENS).unsqueeze(0)
    assert_exact(model, [batch], next_token_loss)
