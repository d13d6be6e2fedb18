"""Wrong input: an error with the value found and the remedy, and an unchanged model."""

import warnings

import pytest
import torch
from torch import nn

from fishkern import FisherVerificationError, estimate_fisher
from tests.scoring.test_estimate_preserve import assert_unchanged, state
from tests.support.oracle import squared_error

N, I, O = 4, 3, 2  # samples, input and output features  # noqa: E741


def model():
    made = nn.Sequential(nn.Linear(I, I), nn.BatchNorm1d(I), nn.Dropout(0.5), nn.Linear(I, O))
    made[0].weight.grad = torch.ones(I, I)
    return made.train()


def batches(n=N):
    return [(torch.randn(n, I), torch.randn(n, O)) for _ in range(2)]


def frozen():
    return model().requires_grad_(False)


def quantised():
    made = model()
    made.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    return made


def times(factor):
    return lambda model, batch: squared_error(model, batch) * factor


def summed(model, batch):
    return squared_error(model, batch).sum()


def per_token(model, batch):
    return (model(batch[0]) - batch[1]).square()


def listed(model, batch):
    return list(squared_error(model, batch))


def repeated(model, batch):
    return squared_error(model, batch).repeat(2)


def on_mapping(loss_fn):
    return lambda model, batch: loss_fn(model, (batch["x"], batch["labels"]))


def mapping():
    return [{"x": x, "labels": y} for x, y in batches()]


# name: (model, batches, keyword arguments, exception, parts of its message)
CASES = {
    "labels": (model, batches, {"labels": "observed"}, ValueError, ["'observed'", "empirical"]),
    "num_samples-zero": (
        model,
        batches,
        {"num_samples": 0},
        ValueError,
        ["num_samples is 0", "None for all"],
    ),
    "num_samples-negative": (
        model,
        batches,
        {"num_samples": -3},
        ValueError,
        ["num_samples is -3", "at least 1"],
    ),
    "num_samples-fraction": (
        model,
        mapping,
        {"num_samples": 2.5, "loss_fn": on_mapping(squared_error)},
        TypeError,
        ["num_samples is 2.5", "int"],
    ),
    "num_samples-inside-a-batch": (
        model,
        batches,
        {"num_samples": 5},
        ValueError,
        ["num_samples is 5", "ends at 8", "batch boundary"],
    ),
    "verify-negative": (model, batches, {"verify": -1}, ValueError, ["verify is -1", "pass 0"]),
    "nothing-trainable": (
        frozen,
        batches,
        {},
        ValueError,
        ["no parameter requires a gradient", "requires_grad_(True)", "params="],
    ),
    "params-unmatched": (
        model,
        batches,
        {"params": "0.weigth"},
        ValueError,
        ["'0.weigth'", "none of 6", "0.weight"],
    ),
    "params-one-of-two-unmatched": (
        model,
        batches,
        {"params": ["0.*", "head.*"]},
        ValueError,
        ["params", "'head.*'"],
    ),
    "params-predicate-chose-none": (
        model,
        batches,
        {"params": lambda name, param: False},
        ValueError,
        ["params", "none of 6"],
    ),
    "params-empty": (model, batches, {"params": []}, ValueError, ["params", "None for"]),
    "params-not-a-string": (model, batches, {"params": [3]}, TypeError, ["params", "3", "globs"]),
    "params-quantised": (
        quantised,
        batches,
        {"params": "*"},
        ValueError,
        ["'codes'", "torch.int8", "leave it out"],
    ),
    "batches-empty": (model, list, {}, ValueError, ["no samples", "at least one batch"]),
    "batch-without-tensors": (
        model,
        lambda: [{"x": "text"}],
        {"loss_fn": on_mapping(squared_error)},
        ValueError,
        ["no tensor with samples in dimension 0", "x", "loss_fn"],
    ),
    "loss-summed": (
        model,
        batches,
        {"loss_fn": summed},
        ValueError,
        ["loss_fn returned []", "one loss per sample", 'reduction="none"'],
    ),
    "loss-per-token": (
        model,
        batches,
        {"loss_fn": per_token},
        ValueError,
        ["loss_fn returned [4, 2]", "[N]"],
    ),
    "loss-is-a-list": (model, batches, {"loss_fn": listed}, ValueError, ["returned list", "[N]"]),
    "loss-of-too-many-samples": (
        model,
        mapping,
        {"loss_fn": on_mapping(repeated)},
        ValueError,
        ["8 losses for a batch of 4", "one loss per sample"],
    ),
    "loss-nan": (
        model,
        batches,
        {"loss_fn": times(torch.nan)},
        RuntimeError,
        ["'0.weight'", "NaN", "infinities in the loss"],
    ),
    "loss-overflows": (
        model,
        batches,
        {"loss_fn": times(1e30), "verify": 0},
        RuntimeError,
        ["'0.weight'", "overflowed", "float32 or bfloat16"],
    ),
    "loss-without-regard-to-the-batch": (
        model,
        batches,
        {"loss_fn": lambda model, batch: squared_error(model, batch).sum().expand(N)},
        ValueError,
        ["4 losses for a batch of 1", "one loss per sample"],
    ),
    "not-a-model": (
        lambda: {"weight": torch.ones(2)},
        batches,
        {},
        TypeError,
        ["model is a dict", "nn.Module"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused(name):
    make, data, kwargs, exception, parts = CASES[name]
    net, data = make(), data()
    before = state(net) if isinstance(net, nn.Module) else None
    kwargs = {"loss_fn": squared_error, **kwargs}
    with pytest.raises(exception) as caught:
        estimate_fisher(net, data, progress=False, **kwargs)
    assert type(caught.value) is exception
    for part in parts:
        assert part in str(caught.value)
    if before is not None:
        assert_unchanged(net, before)


@pytest.mark.parametrize("verify", [0, 2])
def test_nan_is_not_taken_for_samples_that_depend_on_each_other(verify):
    with pytest.raises(RuntimeError, match="overflowed or are NaN") as caught:
        estimate_fisher(model(), batches(), loss_fn=times(torch.nan), verify=verify, progress=False)
    assert not isinstance(caught.value, FisherVerificationError)


@pytest.mark.parametrize("at", [0, 1])
def test_float16_that_overflows_is_detected(at):
    data = batches()
    data[at][1].mul_(1e30)  # infinite in float16
    net = model().half()
    data = [(x.half(), y.half()) for x, y in data]
    with pytest.raises(RuntimeError, match="overflowed or are NaN"):
        estimate_fisher(net, data, loss_fn=squared_error, progress=False)


def test_a_sharded_parameter_is_refused():
    net = model()
    net[0].weight.placements = ()  # as a DTensor has them
    with pytest.raises(ValueError, match=r"'0.weight' is sharded.*before sharding"):
        estimate_fisher(net, batches(), loss_fn=squared_error, progress=False)


@pytest.mark.parametrize("exception", [KeyError("mine"), RuntimeError("mine"), StopIteration("x")])
def test_the_callers_own_exceptions_pass_through_unchanged(exception):
    def loss_fn(model, batch):
        raise exception

    with pytest.raises(type(exception)) as caught:
        estimate_fisher(model(), batches(), loss_fn=loss_fn, progress=False)
    assert caught.value is exception


def test_the_callers_own_warnings_pass_through():
    def loss_fn(model, batch):
        warnings.warn("mine", UserWarning, stacklevel=1)
        return squared_error(model, batch)

    with pytest.warns(UserWarning, match="mine"):
        estimate_fisher(model(), batches(), loss_fn=loss_fn, progress=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_segment_that_no_gradient_reaches(reentrant):
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(I, I), nn.Linear(I, O))

    def loss_fn(model, batch):
        x = checkpoint(model[0], batch[0], use_reentrant=reentrant)
        return squared_error(model[1], (x, batch[1]))

    def run():
        return estimate_fisher(net, batches(), loss_fn=loss_fn, progress=False)

    if not reentrant:
        assert run()["0.weight"].count_nonzero()
        return
    with pytest.raises(RuntimeError, match=r"cuts off the gradient.*use_reentrant=False"):
        run()
