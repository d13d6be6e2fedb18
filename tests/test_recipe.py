"""``create_fish_optimizer``: nothing but the mask remains of warm-up and scoring."""

import copy
import random

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fishkern
from fishkern import create_fish_optimizer
from tests.support.problems import bert, classes


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


@pytest.mark.parametrize("rewind", [True, False])
@pytest.mark.parametrize("at", [1, 4, 7], ids=["first", "warm_up", "scoring"])
def test_interrupted(at, rewind):
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
        create(model, interrupted, warmup_steps=5, keep="head.*", rewind=rewind)
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
        ({"num_samples": 0}, ValueError, "num_samples is 0: pass at least 1, or None for all"),
        ({"num_samples": "8"}, TypeError, "num_samples is '8': pass an int, or None for all"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps is -1"),
        ({"scope": "layer"}, ValueError, "scope is 'layer'.*global, tensor"),
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


@pytest.mark.parametrize("rewind", [True, False])
def test_an_error_after_attaching_detaches(monkeypatch, rewind):
    model = Net()

    def failing(*args, **kwargs):
        raise OSError("no")

    monkeypatch.setattr("fishkern.recipe._FishOptimizer", failing)
    before = picture(model)
    with pytest.raises(OSError, match="no"):
        create(model, train_only=True, warmup_steps=2, rewind=rewind)
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


# When to score.


def warmed(model, data, steps, names=None):
    """A copy of the model after ordinary AdamW steps of the named parameters."""
    model = copy.deepcopy(model)
    params = [p for n, p in model.named_parameters() if names is None or n in names]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    training = [(module, module.training) for module in model.modules()]
    model.train()
    for step in range(steps):
        model.zero_grad()
        loss_fn(model, data[step % len(data)]).mean().backward()
        optimizer.step()
    model.zero_grad()
    for module, mode in training:
        module.training = mode
    return model


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rewind", [True, False])
def test_scores_are_those_of_the_warmed_weights(steps, scope, rewind):
    model, data = Net(), batches()
    start = copy.deepcopy(model)
    optimizer = create_fish_optimizer(
        model, data, density=0.1, lr=1e-3, warmup_steps=steps, scope=scope, rewind=rewind,
        num_samples=16, loss_fn=loss_fn, progress=False,
    )  # fmt: skip
    trained = warmed(start, data, steps)
    fisher = fishkern.estimate_fisher(
        trained, data, loss_fn=loss_fn, num_samples=16, progress=False
    )
    assert optimizer.fisher == fisher
    mask = fishkern.select(fisher, density=0.1, scope=scope)
    assert optimizer.mask.fingerprint == mask.fingerprint
    expected = start if rewind else trained
    for name, value in expected.state_dict().items():
        if name != "norm.num_batches_tracked" or rewind:
            assert torch.equal(model.state_dict()[name], value), name
    assert model.training


def test_scope_gives_each_tensor_its_share():
    shares = create(Net(), density=0.5, scope="tensor").mask
    for name, shape in shares.shapes.items():
        assert abs(len(shares[name]) - 0.5 * shape.numel()) <= 1, name


@pytest.mark.parametrize("train_only", [False, True])
def test_kept_warm_weights_are_trained_on(train_only):
    model, data = Net(), batches()
    start = copy.deepcopy(model)
    optimizer = create_fish_optimizer(
        model, data, density=0.2, lr=1e-2, warmup_steps=4, keep="head.*", rewind=False,
        num_samples=16, loss_fn=loss_fn, progress=False, train_only=train_only,
    )  # fmt: skip
    trained = warmed(start, data, 4, names=("head.weight", "head.bias"))
    for name, value in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    assert not torch.equal(model.head.weight, start.head.weight)
    before = model.head.weight.detach().clone()
    loss_fn(model, data[0]).mean().backward()
    optimizer.step()
    change = (model.head.weight - before).abs()
    assert (change > 0).all()
    assert (change < 0.011).all()  # one step of lr 1e-2 away: no leaf held the initial weights


def test_a_fresh_lora_is_warmed_up_and_at_initialisation_hides_its_a():
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=["query"]))
    data = [classes() for _ in range(2)]

    def scores_of_a(**options):
        optimizer = create_fish_optimizer(
            model, data, density=0.25, lr=1e-3, num_samples=8, progress=False, **options
        )
        return [score for name, score in optimizer.fisher.items() if "lora_A" in name]

    assert all((score > 0).any() for score in scores_of_a())
    with pytest.warns(UserWarning, match="all scores are zero in 2 of 4 tensors"):
        assert not any(score.any() for score in scores_of_a(warmup_steps=0))


def test_an_iterator_is_taken_once_warm_up_first():
    taken, data = [], batches()

    def once():
        for n, batch in enumerate(data):
            taken.append(n)
            yield batch

    model = Net()
    start = copy.deepcopy(model)
    optimizer = create_fish_optimizer(
        model, once(), density=0.1, lr=1e-3, warmup_steps=2, num_samples=8, loss_fn=loss_fn,
        progress=False,
    )  # fmt: skip
    assert taken == [0, 1, 2]
    fisher = fishkern.estimate_fisher(
        warmed(start, data, 2), data[2:3], loss_fn=loss_fn, progress=False
    )
    assert optimizer.fisher == fisher


@pytest.mark.parametrize("steps", [4, 5])
def test_an_iterator_that_ends_with_the_warm_up(steps):
    model = Net()
    before = picture(model)
    data = batches()
    with pytest.raises(ValueError, match=r"none after those of the warm-up.*fewer warmup_steps"):
        create_fish_optimizer(
            model, iter(data), density=0.1, lr=1e-3, warmup_steps=steps, loss_fn=loss_fn,
            progress=False,
        )  # fmt: skip
    assert_as_before(model, before)


@pytest.mark.parametrize("data", [[], [(torch.randn(0, 4), torch.randint(3, (0,)))]], ids=len)
def test_no_samples_to_warm_up_with(data):
    with pytest.raises(ValueError, match=r"pass at least one batch|pass more, a list"):
        create_fish_optimizer(
            Net(), data, density=0.1, lr=1e-3, warmup_steps=2, loss_fn=loss_fn, progress=False
        )
