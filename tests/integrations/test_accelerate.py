"""Accelerate: prepared, accumulating, in bfloat16, saved and loaded; steps that a scaler skips."""

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

import fishkern
from fishkern import FishSparseAdamW
from tests.support.loops import (
    BATCH,
    DECAY,
    LR,
    STEPS,
    assert_same_weights,
    dataset,
    make_model,
    mask_of,
    weights,
)

ACCUMULATED = 2


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches():
    """A loader with a generator of its own, so that to iterate it draws from no other."""
    samples = dataset(STEPS * ACCUMULATED * BATCH)
    return DataLoader(samples, BATCH, generator=torch.Generator())


def dense(model):
    return FishSparseAdamW(model.named_parameters(), lr=LR, mask=mask_of(model))


def on_leaves(model):
    mask = mask_of(model)
    fishkern.train_only(model, mask)
    return FishSparseAdamW(model.named_parameters(), lr=LR, mask=mask)


def adamw_on_leaves(model):
    handle = fishkern.train_only(model, mask_of(model))
    return torch.optim.AdamW(handle.parameters(), lr=LR, weight_decay=DECAY)


class Run:
    """An Accelerate loop that can be saved and loaded after any number of steps."""

    def __init__(self, make_optimizer, kind, **options):
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATED, **options
        )
        model = make_model(kind)
        optimizer = make_optimizer(model)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        prepared = self.accelerator.prepare(model, optimizer, batches(), schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared

    def train(self, first=0, last=STEPS, save=None):
        for i, batch in enumerate(self.loader):
            if not first * ACCUMULATED <= i < last * ACCUMULATED:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if save is not None and i + 1 == STEPS // 2 * ACCUMULATED:
                self.accelerator.save_state(save)
        return weights(self.accelerator.unwrap_model(self.model))


def check_resumed(make_optimizer, kind, folder, **options):
    before = weights(make_model(kind))
    unbroken = Run(make_optimizer, kind, **options).train(save=folder)
    assert any(not torch.equal(unbroken[name], before[name]) for name in before)
    resumed = Run(make_optimizer, kind, **options)
    resumed.accelerator.load_state(folder)
    assert_same_weights(resumed.train(first=STEPS // 2), unbroken)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "base"])
@pytest.mark.parametrize("make_optimizer", [dense, on_leaves, adamw_on_leaves])
def test_loaded_is_unbroken(make_optimizer, kind, precision, tmp_path):
    check_resumed(make_optimizer, kind, tmp_path, mixed_precision=precision)


@pytest.mark.parametrize("make_optimizer", [dense, on_leaves])
def test_loaded_is_unbroken_in_bfloat16(make_optimizer, tmp_path):
    check_resumed(make_optimizer, "bf16", tmp_path)


@pytest.mark.parametrize("make_optimizer", [dense, on_leaves])
def test_prepared_is_the_plain_loop(make_optimizer):
    run = Run(make_optimizer, "base")
    torch.manual_seed(0)
    prepared = run.train()

    model = make_model("base")
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    torch.manual_seed(0)
    for i, batch in enumerate(batches()):
        (model(**batch).loss / ACCUMULATED).backward()
        if i % ACCUMULATED == ACCUMULATED - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_same_weights(prepared, weights(model))


@pytest.mark.parametrize("capturable", [False, True])
def test_the_schedule_waits_for_a_step_that_the_scaler_skipped(capturable):
    accelerate.Accelerator(cpu=True)
    model = make_model("base")
    optimizer = FishSparseAdamW(
        model.named_parameters(), lr=LR, mask=mask_of(model), capturable=capturable
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    prepared_schedule = AcceleratedScheduler(schedule, prepared)
    batch = next(iter(DataLoader(dataset(), BATCH)))
    rates = []
    for spoil in (False, True, False):
        scaler.scale(model(**batch).loss).backward()
        if spoil:
            next(model.parameters()).grad[0] = float("inf")
        before = weights(model)
        prepared.step()
        prepared_schedule.step()
        prepared.zero_grad()
        assert prepared.step_was_skipped == spoil
        changed = any(not torch.equal(before[n], value) for n, value in weights(model).items())
        assert changed != spoil
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] > rates[2]
    assert scaler.get_scale() == 2.0
    assert all(entry["step"] == 2 for entry in optimizer.state.values() if "step" in entry)
