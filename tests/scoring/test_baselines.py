"""Baseline scores equal their formulas, evaluated by plain autograd in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fishkern
from fishkern import FisherDiagonal, FishSparseAdamW, SparseMask, baseline_scores, select
from fishkern.scoring.baselines import KINDS
from tests.scoring.test_estimate_preserve import assert_unchanged, made, state
from tests.support.optim import full_mask, make_model, train
from tests.support.oracle import fisher_oracle, one_sample, squared_error
from tests.support.problems import PROBLEMS, bert, class_loss, classes
from tests.support.tolerances import assert_matches, assert_scores_match

GRADIENTS = ["gradient", "weight_gradient", "gradient_over_weight", "squared_batch_gradient"]


def scored(model, batches=None, **kwargs):
    return baseline_scores(model, batches, progress=False, **kwargs)


def mean_gradients(model, batches, loss):
    """Gradients of the mean over the samples of all batches, one sample at a time."""
    model = copy.deepcopy(model).double().eval()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    size = 0
    for batch in batches:
        for n in range(len(batch["labels"])):
            one = one_sample(batch, n)
            grads = torch.autograd.grad(loss(model, one), list(params.values()), allow_unused=True)
            for total, grad in zip(totals.values(), grads, strict=True):
                total += 0 if grad is None else grad
            size += 1
    return {name: total / size for name, total in totals.items()}, params


FORMULAS = {
    "gradient": lambda w, g: g.abs(),
    "weight_gradient": lambda w, g: w.abs() * g.abs(),
    "gradient_over_weight": lambda w, g: g.abs() / (w.abs() + 1e-8),
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("name", ["bert", "gpt2-lora", "llama-tied", "t5"])
def test_kinds_of_the_mean_gradient(kind, name):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(3, 5), problem.batch(2, 4)]
    scores = scored(model, batches, kind=kind)
    grads, params = mean_gradients(model, batches, problem.loss)
    assert list(scores) == list(grads)
    assert (scores.kind, scores.num_samples, scores.labels) == (kind, 5, "empirical")
    if kind == "gradient_over_weight":  # quotients by weights near zero: compared as gradients
        scores = {n: s * (params[n].detach().abs() + 1e-8) for n, s in scores.items()}
        kind = "gradient"
    truth = {n: FORMULAS[kind](params[n].detach(), g) for n, g in grads.items()}
    assert_scores_match(scores, truth)


def test_the_squared_gradient_is_of_each_batch():
    model, batches = bert(), [classes(3), classes(2)]
    scores = scored(model, batches, kind="squared_batch_gradient")
    parts = [mean_gradients(model, [batch], class_loss)[0] for batch in batches]
    truth = {n: sum(part[n].square() for part in parts) / 2 for n in parts[0]}
    assert_scores_match(scores, truth)


def test_squared_gradients_of_single_samples_are_fisher_information_and_of_more_are_not():
    model, batch = bert(), classes(4)
    singles = [one_sample(batch, n) for n in range(4)]
    scores = scored(model, singles, kind="squared_batch_gradient")
    truth = fisher_oracle(model, [batch], class_loss, list(scores))
    assert_scores_match(scores, truth)
    with pytest.raises(AssertionError):
        assert_scores_match(scored(model, [batch], kind="squared_batch_gradient"), truth)


def test_a_zero_weight_ranks_by_its_gradient_above_all_others():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data[0, 1] = 0
    batch = torch.randn(4, 3), torch.randn(4, 2)
    scores = scored(model, [batch], kind="gradient_over_weight", loss_fn=squared_error)
    gradient = scored(model, [batch], kind="gradient", loss_fn=squared_error)["weight"]
    assert scores["weight"].isfinite().all()
    assert select(scores, k=1)["weight"].tolist() == [1]
    assert_matches(scores["weight"][0, 1], gradient[0, 1].double() / 1e-8)


def test_bfloat16_weights_are_scored_in_float32():
    model = nn.Linear(8, 2, bias=False).bfloat16()
    batches = [(torch.randn(4, 8).bfloat16(), torch.randn(4, 2).bfloat16()) for _ in range(64)]
    scores = scored(model, batches, kind="gradient", loss_fn=squared_error)
    total = torch.zeros(2, 8, dtype=torch.float64)
    for batch in batches:  # what each batch gives, summed without rounding
        model.zero_grad()
        squared_error(model, batch).mean().backward()
        total += model.weight.grad.double()
    assert scores["weight"].dtype == torch.float32
    assert_matches(scores["weight"], (total / 64).abs())


def test_magnitude():
    model = make_model(torch.bfloat16)
    scores = scored(model, kind="magnitude")
    for name, param in model.named_parameters():
        assert torch.equal(scores[name], param.detach().float().abs())
        assert scores[name].data_ptr() != param.data_ptr()
    assert (scores.num_samples, scores.labels) == (0, None)


def test_magnitude_is_not_the_weights_memory():
    model = nn.Linear(2, 2)
    scores = scored(model, kind="magnitude")
    before = scores["weight"].clone()
    model.weight.data.fill_(7)
    assert torch.equal(scores["weight"], before)


def test_random():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    state = torch.get_rng_state()
    one, same, other = (scored(model, kind="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same
    assert one != other
    assert not torch.equal(one["0.weight"], one["1.weight"])
    assert all(s.min() > 0 and s.max() <= 1 for s in one.values())
    assert abs(one["0.weight"].mean() - 0.5) < 5 * (1 / 12 / 1e4) ** 0.5


@pytest.mark.parametrize("make", ["adamw", "masked", "whole", "amsgrad", "fused"])
def test_second_moment(make):
    model = make_model()
    named = list(model.named_parameters())
    betas = (0.9, 0.99)
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(named, betas=betas),
        "masked": lambda: FishSparseAdamW(named, betas=betas, mask=full_mask(model)),
        "whole": lambda: FishSparseAdamW(named, betas=betas),
        "amsgrad": lambda: torch.optim.Adam(model.parameters(), betas=betas, amsgrad=True),
        "fused": lambda: torch.optim.AdamW(model.parameters(), betas=betas, fused=True),
    }[make]()
    moments = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named}

    def note(*_):
        for name, param in named:
            moments[name].mul_(0.99).add_(0.01 * param.grad.double().square())

    optimizer.register_step_pre_hook(note)
    train(model, optimizer, 3)
    scores = scored(model, kind="second_moment", optimizer=optimizer)
    assert_scores_match(scores, {n: m / (1 - 0.99**3) for n, m in moments.items()})
    assert (scores.kind, scores.num_samples) == ("second_moment", 0)
    before = scores["0.weight"].clone()
    train(model, optimizer, 1)
    assert torch.equal(scores["0.weight"], before)  # not the optimizer's memory


def test_moments_of_groups_with_steps_and_betas_of_their_own():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "betas": (0.9, 0.5)}, {"params": [model.bias]}]
    )
    for step in range(2):
        model.weight.grad = torch.ones(2, 2)
        model.bias.grad = torch.ones(2) if step else None
        optimizer.step()
    scores = scored(model, kind="second_moment", optimizer=optimizer)
    for score in scores.values():  # gradients of one: corrected, their mean square is one
        torch.testing.assert_close(score, torch.ones_like(score))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_model_stays_as_it_was(kind):
    model = made()
    batches = [(torch.randn(4, 5, 3), torch.randn(4, 5, 3)) for _ in range(2)]
    before = state(model)
    scored(model, batches, kind=kind, loss_fn=squared_error)
    assert_unchanged(model, before)


def test_an_interrupt_leaves_the_model_as_it_was():
    model, batch = made(), (torch.randn(4, 5, 3), torch.randn(4, 5, 3))
    before = state(model)

    def interrupted(model, batch):
        squared_error(model, batch).sum().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(model, [batch], kind="gradient", loss_fn=interrupted)
    assert_unchanged(model, before)


def test_dropout_is_off():
    model = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    batch = classes()
    assert scored(model, [batch], kind="gradient") == scored(model, [batch], kind="gradient")


def test_one_gradient_beside_the_scores():
    """After each batch no parameter holds a gradient any more."""
    model, seen = nn.Linear(3, 3), []

    def loss_fn(model, batch):
        seen.append([param.grad for param in model.parameters()])
        return squared_error(model, batch)

    batches = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    scored(model, batches, kind="gradient", loss_fn=loss_fn)
    assert seen == [[None, None]] * 3


def test_num_samples_and_params():
    model, batch = bert(), classes(6)
    cut = {key: value[:4] for key, value in batch.items()}
    scores = scored(model, [batch], kind="gradient", num_samples=4, params="classifier.*")
    assert list(scores) == ["classifier.weight", "classifier.bias"]
    assert scores == scored(model, [cut], kind="gradient", params="classifier.*")
    with pytest.warns(UserWarning, match="num_samples is 9, but batches ended after 6"):
        scored(model, [batch], kind="gradient", num_samples=9)


def test_a_model_trained_by_its_leaves_is_looked_through():
    model = make_model()
    plain = scored(model, kind="magnitude")
    mask = full_mask(model)
    with fishkern.train_only(model, mask):
        assert scored(model, kind="magnitude") == plain


def test_batches_of_no_samples_are_left_out():
    model = nn.Linear(3, 2)
    batches = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (0, 4)]
    scores = scored(model, batches, kind="squared_batch_gradient", loss_fn=squared_error)
    assert scores == scored(
        model, batches[1:], kind="squared_batch_gradient", loss_fn=squared_error
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_selected_by_and_saved_alike(kind, tmp_path):
    model, batches = make_model(), [(torch.randn(4, 6), torch.randn(4, 3))]
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    scores = scored(model, batches, kind=kind, loss_fn=squared_error, seed=0, optimizer=optimizer)
    assert select(scores, density=0.25).num_selected == 25  # of 99
    assert f"kind={kind!r}" in repr(scores)
    scores.save(tmp_path / "scores")
    loaded = FisherDiagonal.load(tmp_path / "scores")
    assert loaded == scores
    assert loaded.kind == kind
    assert loaded != FisherDiagonal(dict(scores), num_samples=1)


def partly_masked(model):
    shapes = {name: param.shape for name, param in model.named_parameters()}
    mask = SparseMask({name: torch.tensor([0]) for name in shapes}, shapes)
    return stepped(model, FishSparseAdamW(model.named_parameters(), mask=mask))


def stepped(model, optimizer):
    train(model, optimizer, 1)
    return optimizer


def without_gradients(model):
    return torch.optim.AdamW(model.parameters())


REFUSED = {
    "unknown": ({"kind": "fisher"}, ["'fisher'", "gradient", "second_moment"]),
    "no-batches": ({"kind": "gradient"}, ["'gradient'", "pass batches"]),
    "no-samples": ({"kind": "gradient", "batches": []}, ["no samples"]),
    "no-seed": ({"kind": "random"}, ["seed=0"]),
    "num_samples": ({"kind": "gradient", "num_samples": 0}, ["num_samples is 0"]),
    "params": ({"kind": "magnitude", "params": "head.*"}, ["'head.*'", "none of 6"]),
    "no-optimizer": ({"kind": "second_moment"}, ["needs the optimizer"]),
    "no-step": (
        {"kind": "second_moment", "optimizer": without_gradients},
        ["'0.weight'", "is empty", "taken a step"],
    ),
    "no-moment": (
        {
            "kind": "second_moment",
            "optimizer": lambda m: stepped(m, torch.optim.SGD(m.parameters(), momentum=0.9)),
        },
        ["SGD", "has momentum_buffer", "AdamW"],
    ),
    "not-in-it": (
        {
            "kind": "second_moment",
            "optimizer": lambda m: stepped(m, torch.optim.AdamW(m[0].parameters())),
        },
        ["'2.weight' is not in the AdamW", "params="],
    ),
    "masked": (
        {"kind": "second_moment", "optimizer": partly_masked},
        ["1 moments", "48 entries of '0.weight'", "whole tensor"],
    ),
    "loss": (
        {
            "kind": "gradient",
            "batches": [(torch.randn(4, 6), torch.randn(4, 3))],
            "loss_fn": lambda model, batch: squared_error(model, batch).sum(),
        },
        ["loss_fn returned []", "one loss per sample"],
    ),
    "detached": (
        {
            "kind": "gradient",
            "batches": [(torch.randn(4, 6), torch.randn(4, 3))],
            "loss_fn": lambda model, batch: squared_error(model, batch).detach(),
        },
        ["require no gradient", "detach()"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    kwargs, parts = REFUSED[name]
    model = make_model()
    kwargs = {"loss_fn": squared_error, **kwargs}
    if "optimizer" in kwargs:
        kwargs["optimizer"] = kwargs["optimizer"](model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts are compared below
        scored(model, **kwargs)
    for part in parts:
        assert part in str(caught.value)


def test_a_float16_gradient_that_overflows_is_detected():
    model = nn.Linear(3, 2).half()
    batch = torch.ones(4, 3).half(), torch.full((4, 2), 3e4).half()

    def loss_fn(model, batch):
        return 1e4 * F.mse_loss(model(batch[0]), batch[1], reduction="none").sum(1)

    with pytest.raises(RuntimeError, match="overflowed or are NaN"):
        scored(model, [batch], kind="gradient", loss_fn=loss_fn)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_segment_that_no_gradient_reaches(reentrant):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def loss_fn(model, batch):
        x = checkpoint(model[0], batch[0], use_reentrant=reentrant)
        return squared_error(model[1], (x, batch[1]))

    def run():
        batch = torch.randn(4, 3), torch.randn(4, 2)
        return scored(net, [batch], kind="gradient", loss_fn=loss_fn)

    if not reentrant:
        assert run()["0.weight"].any()
        return
    with pytest.raises(RuntimeError, match=r"cuts off the gradient.*use_reentrant=False"):
        run()


def test_a_model_of_another_type_is_refused():
    with pytest.raises(TypeError, match="model is a list"):
        scored([], kind="magnitude")
