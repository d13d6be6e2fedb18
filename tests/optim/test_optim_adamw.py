"""Without a mask, and with a full one, FishSparseAdamW is torch.optim.AdamW."""

import copy

import pytest
import torch

from fishkern.optim import FishSparseAdamW
from tests.support.optim import (
    full_mask,
    kernel,  # noqa: F401
    loss_of,
    make_model,
)
from tests.support.tolerances import assert_matches

STEPS = 300
pytestmark = pytest.mark.usefixtures("kernel")


def train(model, optimizer, scheduler=None, steps=STEPS, closure=False):
    for i in range(steps):

        def evaluate(i=i):
            optimizer.zero_grad()
            loss = loss_of(model, i)
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(evaluate).requires_grad
        else:
            evaluate()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_tracks(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_matches(a.detach(), b.detach(), terms=4)  # 2e-6 of the largest value


def two_groups(model, names):
    pairs = list(model.named_parameters())
    pairs = pairs if names else [param for _, param in pairs]
    return [
        {"params": pairs[:2], "lr": 3e-3},
        {"params": pairs[2:], "weight_decay": 0.0, "betas": (0.8, 0.95)},
    ]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "full_mask"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True, "lr": 1e-4},
        {"weight_decay": 0.3},
        {"weight_decay": 0.0},
        {"lr": torch.tensor(2e-3)},
        {"betas": (0.5, 0.9), "eps": 1e-5},
        {"betas": (torch.tensor(0.8), torch.tensor(0.99)), "lr": torch.tensor(1e-3)},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "lr": 1e-4},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_tracks_adamw(masked, options):
    ours = make_model()
    theirs = copy.deepcopy(ours)
    mask = full_mask(ours) if masked else None
    train(ours, FishSparseAdamW(ours.named_parameters(), **options, mask=mask))
    plain = {key: value for key, value in options.items() if key != "fused"}
    train(theirs, torch.optim.AdamW(theirs.parameters(), **plain))
    assert_tracks(ours, theirs)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "full_mask"])
def test_tracks_adamw_with_groups_and_closure(masked):
    ours = make_model()
    theirs = copy.deepcopy(ours)
    mask = full_mask(ours) if masked else None
    train(ours, FishSparseAdamW(two_groups(ours, names=masked), mask=mask), closure=True)
    train(theirs, torch.optim.AdamW(two_groups(theirs, names=False)), closure=True)
    assert_tracks(ours, theirs)


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i / 50)),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 5e-3, total_steps=STEPS + 1),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
}


@pytest.mark.parametrize("lr", [2e-3, torch.tensor(2e-3)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_tracks_adamw_with_schedulers(schedule, lr):
    models = [make_model()]
    models.append(copy.deepcopy(models[0]))
    for model, cls in zip(models, (FishSparseAdamW, torch.optim.AdamW), strict=True):
        optimizer = cls(model.parameters(), lr=copy.deepcopy(lr))
        train(model, optimizer, schedule(optimizer))
    assert_tracks(*models)


def test_state_is_adamws():
    model = make_model()
    ours, theirs = (cls(model.parameters()) for cls in (FishSparseAdamW, torch.optim.AdamW))
    loss_of(model, 0).backward()
    ours.step()
    theirs.step()
    for param in model.parameters():
        assert ours.state[param].keys() == theirs.state[param].keys()
        for key, value in theirs.state[param].items():
            assert ours.state[param][key].shape == value.shape
            assert ours.state[param][key].dtype == value.dtype
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


def test_a_checkpoint_of_adamw_goes_on_here_and_back():
    ours = make_model()
    theirs = copy.deepcopy(ours)
    before = torch.optim.AdamW(ours.parameters(), amsgrad=True)
    train(ours, before, steps=20)
    after = FishSparseAdamW(ours.parameters())
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["amsgrad"]
    train(ours, after, steps=20)
    back = torch.optim.AdamW(ours.parameters())
    back.load_state_dict(after.state_dict())
    train(ours, back, steps=20)

    unbroken = torch.optim.AdamW(theirs.parameters(), amsgrad=True)
    for _ in range(3):
        train(theirs, unbroken, steps=20)
    assert_tracks(ours, theirs)


def test_parameters_without_gradient_wait():
    models = [make_model()]
    models.append(copy.deepcopy(models[0]))
    for model, cls in zip(models, (FishSparseAdamW, torch.optim.AdamW), strict=True):
        optimizer = cls(model.parameters(), lr=1e-2)
        for i in range(60):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for j, param in enumerate(model.parameters()):
                if (i + j) % 3 == 0:
                    param.grad = None
            optimizer.step()
        steps = [optimizer.state[param]["step"].item() for param in model.parameters()]
        assert steps == [40.0] * 6
    assert_tracks(*models)


def test_a_checkpoint_of_adam_is_continued_as_adamw():
    model = make_model()
    before = torch.optim.Adam(model.parameters())
    train(model, before, steps=2)
    after = FishSparseAdamW(model.parameters())
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["decoupled_weight_decay"]
