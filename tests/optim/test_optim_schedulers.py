"""Every scheduler of torch sets learning rates and betas as it does for AdamW."""

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import fishkern
from fishkern.optim import FishSparseAdamW
from tests.support.optim import Oracle, full_mask, loss_of, make_mask, make_model
from tests.support.tolerances import assert_matches

STEPS, LR = 14, 1e-2
SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 10, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 5), schedulers.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 2e-2, step_size_up=3),  # betas too
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 2e-2, total_steps=STEPS + 1),  # betas too
}
BASES = {"LRScheduler"}


def run(model, optimizer, schedule, *, beside=None):
    """Train, and return the learning rates and betas of all steps.

    ``beside``: an oracle that steps on the same gradients, under a scheduler of its own.
    """
    optimizers = [optimizer, *([beside.adamw] if beside else [])]
    plans, seen = [schedule(each) for each in optimizers], []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, i % 2)
        loss.backward()
        optimizer.step()
        if beside:
            beside.step(model)
        seen.append([(float(o.param_groups[0]["lr"]), o.param_groups[0]["betas"][0])
                     for o in optimizers])  # fmt: skip
        for plan in plans:
            plan.step(*([loss.item()] if "Plateau" in type(plan).__name__ else []))
    return seen


def schedule_of(scheduler):
    if scheduler not in SCHEDULES:
        pytest.skip(f"{scheduler}: this torch has one more scheduler than these tests know")
    return SCHEDULES[scheduler]


every_scheduler = pytest.mark.parametrize(
    "scheduler", [name for name in schedulers.__all__ if name not in BASES]
)
each_lr = pytest.mark.parametrize("lr", [LR, torch.tensor(LR)], ids=["float", "tensor"])


@each_lr
@every_scheduler
def test_a_full_mask_is_adamw(scheduler, lr):
    schedule = schedule_of(scheduler)
    models = [make_model() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    lrs = [run(model, optimizer, schedule) for model, optimizer in zip(models, [
        torch.optim.AdamW(models[0].parameters(), lr=LR),
        FishSparseAdamW(models[1].parameters(), lr=_own(lr)),
        FishSparseAdamW(models[2].named_parameters(), lr=_own(lr), mask=full_mask(models[2])),
    ], strict=True)]  # fmt: skip
    assert len(set(map(repr, lrs[0]))) > 1, "the schedule changes nothing"
    for model, found in zip(models[1:], lrs[1:], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(lrs[0]))
        for a, b in zip(model.parameters(), models[0].parameters(), strict=True):
            assert_matches(a.detach(), b.detach(), terms=16)


@each_lr
@every_scheduler
def test_a_mask_is_the_masked_oracle(scheduler, lr):
    schedule = schedule_of(scheduler)
    model = make_model()
    mask = make_mask(model)
    oracle = Oracle(model, mask, lr=LR)
    optimizer = FishSparseAdamW(model.named_parameters(), lr=_own(lr), mask=mask)
    seen = run(model, optimizer, schedule, beside=oracle)
    torch.testing.assert_close(*(torch.tensor(one) for one in zip(*seen, strict=True)))
    for name, param in model.named_parameters():
        assert_matches(param.detach(), oracle.params[name], terms=STEPS)


@every_scheduler
def test_leaves_are_the_same_weights(scheduler):
    schedule = schedule_of(scheduler)
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = make_mask(models[0])
    fishkern.train_only(models[1], mask)
    for model in models:
        run(model, FishSparseAdamW(model.named_parameters(), lr=LR, mask=mask), schedule)
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert_matches(b, a.double(), terms=16)


def _own(lr):
    """A tensor of each optimizer's own: schedulers write into it."""
    return lr.clone() if isinstance(lr, torch.Tensor) else lr
