"""``capturable=True``: a step reads nothing from the device, so that a CUDA graph can hold it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fishkern
from fishkern import _dispatch
from fishkern.optim import FishSparseAdamW
from tests.support.optim import make_mask, make_model
from tests.support.tolerances import assert_matches

WAYS = ("no_mask", "mask", "some", "leaves", "remasked")
SCALE = 2.0**7


class HostRead(Exception):
    """A value was asked for that lies, or might lie, on a device."""


def refuse(*args, **kwargs):
    raise HostRead


class NoHostReads(TorchDispatchMode):
    """Refuses what waits for a device: ``float(t)``, ``t.item()``, ``if t:``, ``nonzero``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "_local_scalar_dense" in name or "nonzero" in name:
            raise HostRead(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads(monkeypatch):
    """Steps inside read no value. The compiled kernel, as a GPU's, takes scalars as tensors."""
    reason = _dispatch.why_not("native")
    if reason is not None:
        pytest.skip(f"native: {reason}")

    def step(optimizer):
        with monkeypatch.context() as patch, NoHostReads():
            for name in ("tolist", "numpy", "cpu"):  # these reach no dispatcher on a CPU
                patch.setattr(torch.Tensor, name, refuse)
            optimizer.step()

    return step


def build(way, model, **options):
    mask = None if way == "no_mask" else make_mask(model)
    if way == "leaves":
        fishkern.train_only(model, mask)
    return FishSparseAdamW(model.named_parameters(), mask=mask, **options)


def give_grads(model, step, way, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for i, param in enumerate(p for p in model.parameters() if p.requires_grad):
        param.grad = scale * torch.randn(param.shape, generator=generator)
        if way == "some" and i == step % 3:
            param.grad = None


def twins(way, **options):
    """Two equal models after two steps, of which the second's optimizer is capturable."""
    model = make_model()
    models = [model, copy.deepcopy(model)]
    rates = 0.1, 0.1 if way == "mask" else torch.tensor(0.1)
    optimizers = [
        build(way, each, lr=lr, capturable=capturable, **options)
        for each, lr, capturable in zip(models, rates, (False, True), strict=True)
    ]
    for each, optimizer in zip(models, optimizers, strict=True):
        for step in range(2):
            give_grads(each, step, way)
            optimizer.step()
            if way == "remasked" and step == 0:
                optimizer.set_mask(make_mask(each, 0.5, seed=1))
    return models, optimizers


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_capturable_step_reads_no_value(way, amsgrad, scaled, no_host_reads):
    models, (plain, capturable) = twins(way, amsgrad=amsgrad)
    if scaled:  # as GradScaler sets them
        capturable.grad_scale = torch.tensor(SCALE)
    for step in range(2, 5):
        give_grads(models[0], step, way)
        give_grads(models[1], step, way, SCALE if scaled else 1.0)
        rate = 0.1 / step
        plain.param_groups[0]["lr"] = rate
        if isinstance(capturable.param_groups[0]["lr"], torch.Tensor):
            capturable.param_groups[0]["lr"].fill_(rate)
        else:
            capturable.param_groups[0]["lr"] = rate
        overflow = scaled and step == 3
        if scaled:
            capturable.found_inf = torch.tensor(float(overflow))
        if not overflow:
            plain.step()
        no_host_reads(capturable)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert_matches(b, a, terms=4)  # as many steps
    states = (optimizer.state.values() for optimizer in (plain, capturable))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a["step"], b["step"])


def test_the_verdict_of_a_scaler_is_read_where_steps_are_counted_on_the_host(no_host_reads):
    models, (plain, _) = twins("mask")
    give_grads(models[0], 2, "mask")
    no_host_reads(plain)  # no device has anything that a plain step needs
    plain.found_inf = torch.tensor(0.0)
    with pytest.raises(HostRead):
        no_host_reads(plain)
