"""Labels from the model's own distribution: sampled, or all of them, exactly."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import FisherDiagonal, estimate_fisher
from fishkern.batches import losses
from fishkern.batches.labels import Draws, expected_terms
from tests.scoring.test_estimate_conditions import process_group
from tests.scoring.test_estimate_fisher import padded
from tests.support.oracle import batch_size, fisher_oracle, squared_error
from tests.support.problems import (
    PROBLEMS,
    bert,
    classes,
    gpt2,
    ids,
    language,
    llama,
    lora,
    padding,
    quiet,
    text,
    token_classes,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*use_reentrant:UserWarning"
)


def score(model, batches, labels, **kwargs):
    return estimate_fisher(model, batches, labels=labels, progress=False, **kwargs)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unlabelled(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


class Output:
    def __init__(self, logits):
        self.logits = logits


class Scores(nn.Module):
    """``logits = x W^T + b``, by a layer with a rule, or by a functional use without one."""

    def __init__(self, features, outputs, functional=False):
        super().__init__()
        self.layer, self.functional = nn.Linear(features, outputs), functional

    def forward(self, x):
        if self.functional:
            return Output(F.linear(x, self.layer.weight, self.layer.bias))
        return Output(self.layer(x))


def softmax_fisher(model, x):
    """The true Fisher information of softmax regression: ``mean_n p_c (1 - p_c) x_i^2``."""
    weight, bias = model.layer.weight.double(), model.layer.bias.double()
    p = (x.double() @ weight.T + bias).softmax(1).detach()
    variance = p * (1 - p)
    return {
        "layer.weight": variance.T @ x.double().square() / len(x),
        "layer.bias": variance.mean(0),
    }


# Expected.


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("outputs", [2, 3, 7])
def test_expected_is_the_closed_form_of_softmax_regression(outputs, functional):
    model, x = Scores(5, outputs, functional), torch.randn(9, 5)
    scores = score(model, [{"x": x[:4]}, {"x": x[4:]}], "expected")
    assert_scores_match(scores, softmax_fisher(model, x))
    assert (scores.labels, scores.num_samples) == ("expected", 9)
    assert set(scores.routes.values()) == {"loop" if functional else "fused"}


def test_expected_of_a_value_is_the_squared_gradient_of_the_output():
    model, x = Scores(5, 1), torch.randn(9, 5)
    scores = score(model, [{"x": x}], "expected")
    truth = {"layer.weight": x.double().square().mean(0)[None], "layer.bias": torch.ones(1)}
    assert_scores_match(scores, {name: value.double() for name, value in truth.items()})


def expected_oracle(model, batches, names):
    """``1/N sum_n sum_c p_c (grad log p_c)^2``: the plain sum over all classes, in float64."""
    totals = 0.0
    for batch in batches:
        num_classes = model(**unlabelled(batch)).logits.shape[1]
        for c in range(num_classes):

            def loss(model, one, c=c):
                log_p = model(**unlabelled(one)).logits[0].log_softmax(0)
                return log_p[c] * (log_p[c] / 2).exp().detach()

            with_size = {**batch, "labels": torch.zeros(batch_size(batch))}
            found = fisher_oracle(model, [with_size], loss, names)
            stacked = torch.cat([found[name].flatten() for name in names])
            totals = totals + stacked * batch_size(batch)
    totals = totals / sum(batch_size(batch) for batch in batches)
    sizes = [found[name].numel() for name in names]
    parts = totals.split(sizes)
    return {n: part.view(found[n].shape) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("name", ["bert", "bert-lora", "bert-choices"])
@pytest.mark.parametrize("verify", [0, 2])
def test_expected_is_the_sum_over_the_classes(name, verify):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(3, 5), problem.batch(1, 4)]
    scores = score(model, map(unlabelled, batches), "expected", verify=verify)
    assert_scores_match(scores, expected_oracle(model.eval(), batches, list(scores)))
    assert "fused" in scores.routes.values()
    if name == "bert-choices":
        assert "loop" in scores.routes.values()


def test_every_weight_under_an_adapter():
    model, batch = lora(bert(), ["query", "value"]), classes(4)
    scores = score(model, [batch], "expected", params="*")
    assert_scores_match(scores, expected_oracle(model.eval(), [batch], list(scores)))


@pytest.mark.parametrize("backend_name", ["reference", "native"])
def test_backends(backend_name):
    from fishkern import _dispatch, use_backend

    if reason := _dispatch.available()[backend_name]:
        pytest.skip(reason)
    model, x = Scores(5, 4), torch.randn(6, 5)
    with use_backend(backend_name):
        assert_scores_match(score(model, [{"x": x}], "expected"), softmax_fisher(model, x))


@pytest.mark.parametrize("detached", [False, True])
def test_a_module_that_is_called_twice(detached):
    class Twice(Scores):
        def forward(self, x):
            once = torch.tanh(self.layer(x))
            return Output(self.layer(once.detach() if detached else once))

    model, batch = Twice(4, 4), {"x": torch.randn(5, 4)}
    scores = score(model, [batch], "expected")
    assert set(scores.routes.values()) == {"fused"}
    with_labels = {**batch, "labels": torch.zeros(5)}
    assert_scores_match(scores, expected_oracle(model, [with_labels], list(scores)))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_module_in_two_checkpointed_segments(reentrant):
    class Twice(Scores):
        def segment(self, x):
            if reentrant is None:
                return self.layer(x)
            return checkpoint(self.layer, x, use_reentrant=reentrant)

        def forward(self, x):
            return Output(self.segment(torch.tanh(self.segment(x.requires_grad_()))))

    model, batch = Twice(4, 4), {"x": torch.randn(5, 4), "labels": torch.randint(4, (5,))}
    scores = score(model, [batch], "expected")
    reentrant = None
    assert_scores_match(scores, expected_oracle(model, [batch], list(scores)))
    assert set(scores.routes.values()) == {"fused"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, batch = quiet(bert)(), unlabelled(classes(4))
    plain = score(model, [batch], "expected")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = score(model, [batch], "expected")
    assert_scores_match(again, {name: s.double() for name, s in plain.items()})


@pytest.mark.parametrize("labels", ["expected", "sampled"])
def test_autocast(labels):
    model, batch = bert(), unlabelled(classes(4))
    plain = score(model, [batch], labels, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, [batch], labels, generator=seeded(0))
    if labels == "expected":  # drawn labels may flip by rounding
        one, other = (torch.cat([s.flatten() for s in f.values()]) for f in (plain, scores))
        assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.99
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in scores.values())


def test_expected_terms_have_the_covariance_of_the_labels():
    """``sum_j (d term_j / d f)^2`` is ``diag(p) - p p^T``, at extreme logits too."""
    rows = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [90.0, 0.0, -90.0, 1.0],
            [-200.0, -200.0, 0.0, 200.0],
            [200.0, 0.0, -200.0, -200.0],
            [1.0, float("-inf"), 2.0, float("-inf")],
            [float("-inf"), 0.0, 1.0, 2.0],
        ],
        dtype=torch.float64,
    )
    for f in [*rows, *(3 * torch.randn(20, 4, dtype=torch.float64))]:
        terms = torch.autograd.functional.jacobian(lambda f: expected_terms(f[None])[:, 0], f)
        p = f.softmax(0)
        products = p.outer(p).fill_diagonal_(0)
        truth = products.sum(1).diag() - products  # p - p^2 without its cancellation
        assert_matches(terms.T @ terms, truth, torch.float64)


def test_sums_by_sample_are_over_all_terms():
    model, x = Scores(5, 4), torch.randn(6, 5)
    scores = score(model, [{"x": x}], "expected", sample_scores=True)
    assert torch.equal(scores.sample_scores > 0, torch.ones(6, dtype=torch.bool))
    each = [
        sum(value.sum() for value in softmax_fisher(model, x[n : n + 1]).values()) for n in range(6)
    ]
    assert_matches(scores.sample_scores, torch.stack(each), terms=24)


def test_ignored_samples_count_without_information():
    model, x = Scores(5, 3), torch.randn(6, 5)
    given = torch.tensor([0, -100, 1, 2, -100, 0])
    scores = score(model, [{"x": x, "labels": given}], "expected")
    truth = softmax_fisher(model, x[given != -100])
    assert_scores_match(scores, {name: value * 4 / 6 for name, value in truth.items()})


def test_expected_draws_nothing_and_ignores_the_data():
    model, batch = bert(), classes(4)
    other = {**batch, "labels": (batch["labels"] + 1) % 3}
    torch.manual_seed(1)
    one = score(model, [batch], "expected")
    torch.manual_seed(2)
    assert one == score(model, [other], "expected")


# Sampled.


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


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_one_sample(labels):
    model, x = Scores(5, 2), torch.randn(1, 5)
    scores = score(model, [{"x": x}], labels)
    p = model(x).logits.detach().softmax(1)
    one = x.square() * (p.prod() if labels == "expected" else 1)
    ratios = scores["layer.weight"] / one
    assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4)
    if labels == "expected":
        torch.testing.assert_close(ratios, torch.ones(2, 5))


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_num_samples_cuts_an_unlabelled_batch(labels):
    model, x = Scores(5, 3), torch.randn(8, 5)
    cut = score(model, [{"x": x}], labels, num_samples=6, generator=seeded(0))
    assert cut == score(model, [{"x": x[:6]}], labels, generator=seeded(0))


# Generators.


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
    torch.set_num_threads(1)
    generator = seeded(0)
    with process_group(rank, 2, path / "store"):
        group = torch.distributed.group.WORLD
        scores = score(model, [batch], "sampled", generator=generator, process_group=group)
    scores.save(path / f"{rank}.safetensors")


@pytest.mark.slow
def test_ranks_of_a_group_draw_differently(tmp_path):
    model, batch = Scores(5, 3), {"x": torch.randn(20, 5)}
    mp.spawn(shard, (tmp_path, model, batch), nprocs=2)
    parts = [FisherDiagonal.load(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert parts[0] == parts[1]
    assert (parts[0].labels, parts[0].num_samples) == ("sampled", 40)
    alone = score(model, [batch], "sampled", generator=seeded(0))
    assert not torch.allclose(parts[0]["layer.weight"], alone["layer.weight"])


# What surrounds them.


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_the_batch_and_the_models_config_stay_as_they_were(labels):
    model, batch = bert(), unlabelled(classes())
    before, keys = model.config.to_dict(), list(batch)
    score(model, [batch], labels)
    assert list(batch) == keys
    assert model.config.to_dict() == before


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_placeholders_of_an_unlabelled_data_set_are_no_labels(labels):
    model, batch = bert(), classes()
    given = {**batch, "labels": torch.full_like(batch["labels"], -1)}
    scores = score(model, [given], labels, generator=seeded(0))
    assert scores == score(model, [unlabelled(batch)], labels, generator=seeded(0))


def test_the_file_says_which_labels(tmp_path):
    scores = score(Scores(4, 2), [{"x": torch.randn(3, 4)}], "expected")
    scores.save(tmp_path / "scores")
    assert FisherDiagonal.load(tmp_path / "scores") == scores
    assert FisherDiagonal.load(tmp_path / "scores").labels == "expected"


def several_labels():
    return {**classes(), "labels": torch.randint(0, 2, (4, 3)).float()}


REFUSED = {
    "unknown": (bert, classes, {"labels": "true"}, ["'true'", "empirical, sampled, expected"]),
    "tokens": (gpt2, language, {"labels": "expected"}, ["[4, 6, 50]", 'labels="sampled"']),
    "loss_fn": (
        bert,
        classes,
        {"labels": "sampled", "loss_fn": squared_error},
        ["'sampled'", "loss_fn chooses its own labels", "draw them there"],
    ),
    "several-labels": (bert, several_labels, {"labels": "sampled"}, ["several labels", "loss_fn"]),
    "several-labels-by-config": (
        lambda: bert(problem_type="multi_label_classification"),
        lambda: unlabelled(classes()),
        {"labels": "expected"},
        ["several labels", "loss_fn"],
    ),
    "another-loss": (
        lambda: Wrong(),
        lambda: {"x": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 0])},
        {"labels": "expected"},
        ["trains on something else"],
    ),
    "labels-of-another-length": (
        lambda: PromptedForTokenClassification(),
        lambda: {"x": torch.randn(4, 5, 3), "labels": ids(4, 4)},
        {"labels": "sampled"},
        ["[4, 5, 3]", "labels [4, 4]", "loss_fn"],
    ),
    "mask-of-another-length": (
        lambda: PromptedForTokenClassification(),
        lambda: {"x": torch.randn(4, 5, 3), "attention_mask": torch.ones(4, 4)},
        {"labels": "sampled"},
        ["[4, 5, 3]", "attention_mask [4, 4]", "pass labels [N, T]"],
    ),
}


class Wrong(Scores):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, labels=None):
        output = super().forward(x)
        output.loss = None if labels is None else F.multi_margin_loss(output.logits, labels)
        return output


class PromptedForTokenClassification(Scores):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, attention_mask=None):
        return super().forward(x)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    make, batch, kwargs, parts = REFUSED[name]
    model = make()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts are compared below
        estimate_fisher(model, [batch()], progress=False, **kwargs)
    for part in parts:
        assert part in str(caught.value)


def test_a_generator_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"generator is 3: pass a torch\.Generator"):
        score(bert(), [classes()], "sampled", generator=3)
