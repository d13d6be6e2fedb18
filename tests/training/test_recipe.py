"""``create_fish_optimizer``: nothing but the mask remains of warm-up and scoring."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fishkern
from fishkern import create_fish_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.head(torch.relu(self.norm(self.body(x))))


def loss_fn(model, batch):
    random.random(), np.random.rand(), torch.rand(())
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches():
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]


def create(model, loss_fn=loss_fn, **options):
    options = {"density": 0.1, "lr": 1e-3, "num_samples": 16, "progress": False, **options}
    return create_fish_optimizer(model, batches(), loss_fn=loss_fn, **options)


def random_states():
    return random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()


def picture(model):
    """Everything that a call could leave changed."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
         for p in model.parameters()],
        [(module.training, dict(module.__dict__)) for module in model.modules()],
        model.seen,
    )  # fmt: skip


def assert_as_before(model, before):
    values, params, modules, seen = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    for param, (flag, grad, value) in zip(model.parameters(), params, strict=True):
        assert param.requires_grad == flag
        assert param.grad is grad
        assert grad is None or torch.equal(grad, value)
    for module, (training, attributes) in zip(model.modules(), modules, strict=True):
        assert module.training == training
        assert module.__dict__ == attributes
    assert model.seen == seen


@pytest.mark.parametrize("options", [{"keep": "head.*"}, {"warmup_steps": 5}, {}], ids=str)
@pytest.mark.parametrize("grads", [False, True])
def test_leaves_the_model_as_it_was(options, grads):
    model = Net()
    model.norm.eval()
    if grads:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
    before = picture(model)
    create(model, **options)
    assert_as_before(model, before)


def test_leaves_the_random_states():
    data, model = batches(), Net()
    before = random_states()
    create_fish_optimizer(
        model, data, density=0.1, lr=1e-3, num_samples=8, warmup_steps=3, loss_fn=loss_fn,
        progress=False,
    )  # fmt: skip
    python, (keys, position), of_torch = random_states()
    assert python == before[0]
    assert position == before[1][1]
    assert np.array_equal(keys, before[1][0])
    assert torch.equal(of_torch, before[2])


@pytest.mark.parametrize("at", [1, 4, 7], ids=["first", "warm_up", "scoring"])
def test_interrupted(at):
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    model = Net()
    before = picture(model)
    with pytest.raises(KeyboardInterrupt):
        create(model, interrupted, warmup_steps=5, keep="head.*")
    assert calls == at
    assert_as_before(model, before)


def test_only_the_warmed_have_gradients():
    model = Net()
    seen = []

    def watching(model, batch):
        if model.training:
            seen.append({n for n, p in model.named_parameters() if p.requires_grad})
        return loss_fn(model, batch)

    optimizer = create(model, watching, warmup_steps=3, keep="head.*")
    assert seen == [{"head.weight", "head.bias"}] * 3
    assert optimizer.fisher["body.weight"].any()  # scored nonetheless


def test_warm_up_runs_no_hooks_of_the_caller():
    model = Net()
    called = []
    model.head.weight.register_post_accumulate_grad_hook(called.append)
    create(model, warmup_steps=2)
    assert not called
    loss_fn(model, batches()[0]).sum().backward()
    assert called


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"density": 5}, ValueError, "density is 5"),
        ({"density": None}, TypeError, "density is None"),
        ({"num_samples": 0}, ValueError, "num_samples is 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps is -1"),
        ({"lr": -1.0}, ValueError, "-1.0"),
        ({"wieght_decay": 0.0}, TypeError, "wieght_decay"),
        ({"mask": None}, TypeError, "mask"),
        ({"betas": (0.9, 1.0)}, ValueError, "1.0"),
        ({"keep": "haed.*"}, ValueError, "haed"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_the_work(options, error, match):
    def never(model, batch):
        raise AssertionError("worked before it looked at the arguments")

    model = Net()
    with pytest.raises(error, match=match):
        create(model, never, train_only=True, **options)
    assert fishkern.attached(model) is None


def test_an_error_after_attaching_detaches(monkeypatch):
    model = Net()

    def failing(*args, **kwargs):
        raise OSError("no")

    monkeypatch.setattr("fishkern.recipe._FishOptimizer", failing)
    before = picture(model)
    with pytest.raises(OSError, match="no"):
        create(model, train_only=True)
    assert fishkern.attached(model) is None
    assert_as_before(model, before)


@pytest.mark.parametrize("part", [False, True])
def test_attached_models_are_refused(part):
    model = Net()
    create(model, train_only=True)
    whole = nn.Sequential(model) if part else model
    with pytest.raises(RuntimeError, match="train_only is attached"):
        create(whole)
    assert fishkern.attached(model) is not None


def test_trains():
    model, data = Net(), batches()
    optimizer = create_fish_optimizer(
        model, data, density=0.5, lr=1e-2, num_samples=16, loss_fn=loss_fn, progress=False,
        keep="head.*", train_only=True,
    )  # fmt: skip
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(model, data[0]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_keep_under_ddp(tmp_path):
    """DDP waits for every gradient that it was built for."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        before = picture(model.module)
        create(model, keep="head.*", warmup_steps=3)
        assert_as_before(model.module, before)
    finally:
        dist.destroy_process_group()
