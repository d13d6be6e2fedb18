"""The exact expectation over the labels: a sum over the classes, class by class."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fishkern.batches.labels import expected_terms
from tests.support.labels import Output, Scores, score, softmax_fisher, unlabelled
from tests.support.oracle import batch_size, fisher_oracle
from tests.support.problems import (
    PROBLEMS,
    bert,
    classes,
    lora,
    quiet,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*use_reentrant:UserWarning"
)


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

    if reason := _dispatch.why_not(backend_name):
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
