"""Labels drawn from the model's own distribution, and the generators that draw them."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import FisherDiagonal
from fishkern.batches import losses
from fishkern.batches.labels import Draws
from tests.scoring.test_estimate_fisher import padded
from tests.support.labels import Output, Scores, score, seeded, unlabelled
from tests.support.oracle import fisher_oracle
from tests.support.problems import (
    PROBLEMS,
    bert,
    gpt2,
    ids,
    language,
    llama,
    padding,
    text,
    token_classes,
)
from tests.support.processes import two_processes
from tests.support.tolerances import assert_scores_match

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*use_reentrant:UserWarning"
)


@pytest.fixture
def drawn(monkeypatch):
    """All labels that are drawn, in order: [N] or [N, T] each time."""
    found, draw = [], losses._draw_labels

    def recording(*args):
        found.append(draw(*args))
        return found[-1]

    monkeypatch.setattr(losses, "_draw_labels", recording)
    return found


NAMES = ["bert", "bert-lora", "bert-regression", "bert-tokens", "gpt2", "llama-tied", "opt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verify", [0, 2])
def test_sampled_is_exact_for_the_labels_drawn(name, verify, drawn):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(3, 5), problem.batch(1, 4)]
    scores = score(model, batches, "sampled", verify=verify)
    assert len(drawn) == 2, "one draw for each batch, whatever the passes"
    with_drawn = [{**b, "labels": y} for b, y in zip(batches, drawn, strict=True)]
    assert_scores_match(scores, fisher_oracle(model, with_drawn, problem.loss, list(scores)))
    assert scores.labels == "sampled"
    for batch, labels in zip(batches, drawn, strict=True):
        assert labels.shape == batch["labels"].shape
        assert not torch.equal(labels, batch["labels"]), "the data's own labels"


def test_one_sample_passes_alone_draw_for_each_sample(drawn):
    model, batches = Scores(5, 3, functional=True), [{"x": torch.randn(4, 5)} for _ in range(2)]
    scores = score(model, batches, "sampled", verify=0)
    assert [len(labels) for labels in drawn] == [4, 1, 1, 1, 1]  # by then there is no fused pass
    labels = torch.cat(drawn).split(4)

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]).logits, batch["labels"], reduction="sum")

    with_drawn = [{**b, "labels": y} for b, y in zip(batches, labels, strict=True)]
    assert_scores_match(scores, fisher_oracle(model, with_drawn, loss, list(scores)))


def test_the_inputs_of_a_decoder_are_the_datas(drawn):
    problem = PROBLEMS["t5"]
    model, batch = problem.model(), problem.batch()
    scores = score(model, [batch], "sampled")
    inputs = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}
    without = score(model, [unlabelled(inputs)], "sampled", params="shared.weight")
    assert without["shared.weight"].any()
    assert torch.equal(drawn[0] == -100, batch["labels"] == -100)

    def loss(model, one):
        logits = model(**unlabelled(one)).logits.transpose(1, 2)
        return F.cross_entropy(logits, one["labels"], reduction="sum")

    truth = fisher_oracle(model, [{**inputs, "labels": drawn[0]}], loss, list(scores))
    assert_scores_match(scores, truth)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_mean_over_many_draws_is_the_expectation(outputs):
    """Within five standard deviations, entry by entry; the variance is known."""
    draws, model, x = 20000, Scores(4, outputs), torch.randn(3, 4)
    scores = score(model, [{"x": x.repeat(draws, 1)}], "sampled", generator=seeded(0))
    p = (x.double() @ model.layer.weight.double().T + model.layer.bias.double()).detach()
    if outputs == 1:  # z^2 for z ~ N(0, 1)
        mean, variance = torch.ones(3, 1), 2 * torch.ones(3, 1)
    else:  # (1 - p)^2 with probability p, else p^2
        p = p.softmax(1)
        mean, variance = p * (1 - p), p * (1 - p) * (1 - 2 * p).square()
    squares = x.double().square()
    truth = mean.double().T @ squares / 3
    bound = 5 * (variance.double().T @ squares.square()).sqrt() / 3 / draws**0.5
    error = (scores["layer.weight"].double() - truth).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert bound.max() < 0.1 * truth.max()  # the bound says something


def test_each_sample_and_each_token_draws_for_itself(drawn):
    model = Scores(4, 3)
    score(model, [{"x": torch.randn(1, 4).repeat(50, 1)}], "sampled")
    assert drawn[0].unique().tolist() == [0, 1, 2]
    model = gpt2()
    batch = {"input_ids": ids(1, 6).repeat(50, 1)}
    score(model, [batch], "sampled", params="transformer.h.0.ln_1.weight")
    assert (drawn[1][:, 0] == -100).all()
    columns = drawn[1][:, 1:].T
    assert all(len(column.unique()) > 10 for column in columns)
    assert len(columns.unique(dim=0)) == 5


def test_the_draws_follow_the_models_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, float("-inf")])
    found = Draws(seeded(0)).classes(logits.repeat(20000, 1)).bincount(minlength=4) / 20000
    p = logits.softmax(0)
    assert ((found - p).abs() <= 5 * (p * (1 - p) / 20000).sqrt()).all()
    values = Draws(seeded(0)).values(torch.full((20000,), 3.0))
    assert abs(values.mean() - 3) < 5 / 20000**0.5
    assert abs(values.var() - 1) < 5 * (2 / 20000) ** 0.5


class PointsForTokenClassification(nn.Module):
    """The logits at position t say class t, beyond doubt."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 100.0))

    def forward(self, x):
        return Output(self.scale * torch.eye(x.shape[1]).repeat(len(x), 1, 1))


class PointsForCausalLM(PointsForTokenClassification):
    pass


@pytest.mark.parametrize("model", [PointsForTokenClassification, PointsForCausalLM])
def test_a_token_is_drawn_where_it_is_predicted(model, drawn):
    score(model(), [{"x": torch.zeros(3, 5)}], "sampled")
    where = [-100, 0, 1, 2, 3] if model is PointsForCausalLM else [0, 1, 2, 3, 4]
    assert drawn[0].tolist() == [where] * 3


@pytest.mark.parametrize("name", ["gpt2", "llama-untied"])
def test_ignored_labels_stay_ignored(name, drawn):
    problem = PROBLEMS[name]
    batch = language()
    score(problem.model(), [batch], "sampled")
    assert torch.equal(drawn[0] == -100, batch["labels"] == -100)


def test_ignored_labels_of_tokens_and_samples(drawn):
    batch = token_classes()
    score(bert(transformers.BertForTokenClassification), [batch], "sampled")
    assert torch.equal(drawn[0] == -100, batch["labels"] == -100)
    given = torch.tensor([0, -100, 1, 2])
    score(Scores(4, 3), [{"x": torch.randn(4, 4), "labels": given}], "sampled")
    assert torch.equal(drawn[1] == -100, given == -100)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_labels_the_attention_mask_says_where(side, drawn):
    batch = unlabelled(language(side=side))
    score(llama(), [batch], "sampled")
    mask = batch["attention_mask"]
    counted = mask.clone()
    counted[:, 0] = 0
    counted[:, 1:] *= mask[:, :-1]  # a pad predicts nothing
    assert torch.equal(drawn[0] != -100, counted.bool())
    score(bert(transformers.BertForMaskedLM), [text()], "sampled")
    assert torch.equal(drawn[1] != -100, padding(4, 6).bool())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_longer_padding_draws_the_same_labels(side, with_labels):
    model, batch = llama(), language(side=side)
    longer = padded(batch, 5, side)
    if not with_labels:
        batch, longer = unlabelled(batch), unlabelled(longer)
    scores = score(model, [batch], "sampled", generator=seeded(3))
    again = score(model, [longer], "sampled", generator=seeded(3))
    assert_scores_match(again, {name: s.double() for name, s in scores.items()})


def test_a_batch_without_a_label_scores_nothing():
    batch = language()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    scores = score(llama(), [batch, language()], "sampled", verify=0)
    assert scores.num_samples == 8


def test_the_generator_decides():
    model, batch = Scores(5, 3), {"x": torch.randn(20, 5)}
    generator = seeded(0)
    first = score(model, [batch], "sampled", generator=generator)
    assert first != score(model, [batch], "sampled", generator=generator)  # it has moved on
    assert first == score(model, [batch], "sampled", generator=seeded(0))
    assert first != score(model, [batch], "sampled", generator=seeded(1))


def test_without_a_generator_torchs_own_seed_decides_and_stays():
    model, batch = Scores(5, 3), {"x": torch.randn(20, 5)}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = score(model, [batch], "sampled")
    assert torch.equal(torch.get_rng_state(), before)
    assert score(model, [batch], "sampled") == first
    torch.manual_seed(6)
    assert score(model, [batch], "sampled") != first


def test_a_generator_of_ones_own_leaves_torchs_alone():
    model, batch = Scores(5, 3), {"x": torch.randn(20, 5)}
    before = torch.get_rng_state()
    score(model, [batch], "sampled", generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_draw_differently():
    logits = torch.zeros(100, 5)
    one, other = (Draws(seeded(0), rank).classes(logits) for rank in range(2))
    assert not torch.equal(one, other)


def shard(rank, path, model, batch):
    group = torch.distributed.group.WORLD
    scores = score(model, [batch], "sampled", generator=seeded(0), process_group=group)
    scores.save(path / f"{rank}.safetensors")


@pytest.mark.slow
def test_ranks_of_a_group_draw_differently(tmp_path):
    model, batch = Scores(5, 3), {"x": torch.randn(20, 5)}
    two_processes(shard, tmp_path, model, batch)
    parts = [FisherDiagonal.load(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert parts[0] == parts[1]
    assert (parts[0].labels, parts[0].num_samples) == ("sampled", 40)
    alone = score(model, [batch], "sampled", generator=seeded(0))
    assert not torch.allclose(parts[0]["layer.weight"], alone["layer.weight"])
