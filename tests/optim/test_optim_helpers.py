"""torch's helpers around an optimizer: averaged models, clipping, accumulation, closures."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import fishkern
from fishkern.optim import FishSparseAdamW
from tests.support.optim import Oracle, full_mask, loss_of, make_mask, make_model, train
from tests.support.tolerances import assert_matches

STEPS, LR = 9, 1e-2
AVERAGES = {
    "swa": (None, lambda n: [1 / n] * n),
    "ema": (
        swa_utils.get_ema_multi_avg_fn(0.7),
        lambda n: [0.7 ** (n - 1), *(0.3 * 0.7 ** (n - i - 1) for i in range(1, n))],
    ),
}
both_ways = pytest.mark.parametrize("leaves", [False, True], ids=["dense", "leaves"])


def trainer(leaves, model=None, mask=None, **options):
    model = make_model() if model is None else model
    mask = make_mask(model) if mask is None else mask
    if leaves:
        fishkern.train_only(model, mask)
    return model, FishSparseAdamW(model.named_parameters(), lr=LR, mask=mask, **options)


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@both_ways
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averaged_models_are_the_averages_of_the_weights(average, leaves, dtype):
    function, factors_of = average
    model, optimizer = trainer(leaves, make_model(dtype))
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=function)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=3e-2, anneal_epochs=4)
    seen, rates = [], set()
    for i in range(STEPS):
        train(model, optimizer, 1, start=i)
        averaged.update_parameters(model)
        scheduler.step()
        seen.append(weights(model))
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 3
    factors = factors_of(len(seen))
    assert sum(factors) == pytest.approx(1)
    truth = {
        key: sum(f * one[key].double() for f, one in zip(factors, seen, strict=True))
        for key in seen[0]
    }
    expected = nn.Sequential(*copy.deepcopy(make_model(dtype)))
    expected.load_state_dict(truth)
    found = averaged.module.state_dict()
    for key in truth:  # every average rounds, one after the other
        assert_matches(found[key], truth[key], dtype, terms=STEPS)
    assert not torch.equal(found["0.weight"], model.state_dict()["0.weight"])
    x = torch.randn(4, 6).to(dtype)
    averaged.eval()
    with torch.no_grad():
        assert_matches(averaged(x), expected(x).double(), dtype, terms=4 * STEPS)


@both_ways
def test_averaging_leaves_the_trained_model_alone(leaves):
    results = []
    for average in (False, True):
        torch.manual_seed(0)
        model, optimizer = trainer(leaves)
        averaged = swa_utils.AveragedModel(model)
        for i in range(STEPS):
            train(model, optimizer, 1, start=i)
            if average:
                averaged.update_parameters(model)
                averaged(torch.randn(2, 6)).sum().backward()
        results.append(weights(model))
    for a, b in zip(*(result.values() for result in results), strict=True):
        assert torch.equal(a, b)


@both_ways
def test_statistics_of_batch_norm_are_updated(leaves):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    batches = [torch.randn(16, 6) for _ in range(3)]
    base = build()
    model, optimizer = trainer(leaves, base, full_mask(base))
    averaged = swa_utils.AveragedModel(model)
    train(model, optimizer, 4)
    averaged.update_parameters(model)
    plain = build()
    plain.load_state_dict(averaged.module.state_dict())
    for each in (averaged, plain):
        swa_utils.update_bn(batches, each)
    for key in ("1.running_mean", "1.running_var"):
        found = averaged.module.state_dict()[key]
        torch.testing.assert_close(found, plain.state_dict()[key])
        assert not torch.equal(found, model.state_dict()[key])


@both_ways
@pytest.mark.parametrize("foreach", [False, True])
def test_clipping_sees_every_entry_of_dense_gradients_and_the_selected_of_leaves(leaves, foreach):
    model = make_model()
    mask = make_mask(model)
    oracle, limit, twin = Oracle(model, mask, lr=LR), 0.05, copy.deepcopy(model)
    model, optimizer = trainer(leaves, model, mask)
    for i in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=foreach)
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, i).backward()
        for name, param in twin.named_parameters():
            if leaves:
                param.grad[~mask.dense(name)] = 0
        total = torch.cat([p.grad.flatten() for p in twin.parameters()]).double().norm()
        assert_matches(norm.detach(), total, terms=100)
        assert total > limit
        for param in twin.parameters():
            param.grad *= limit / total
        optimizer.step()
        oracle.step(twin)
    for name, value in model.state_dict().items():
        assert_matches(value, oracle.params[name], terms=50)


@both_ways
def test_values_are_clipped_entry_by_entry(leaves):
    model = make_model()
    mask = make_mask(model)
    oracle, twin = Oracle(model, mask, lr=LR), copy.deepcopy(model)
    model, optimizer = trainer(leaves, model, mask)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.01)
    loss_of(twin, 0).backward()
    for param in twin.parameters():
        param.grad.clamp_(-0.01, 0.01)
    optimizer.step()
    oracle.step(twin)
    for name, value in model.state_dict().items():
        assert_matches(value, oracle.params[name], terms=4)


@both_ways
def test_accumulated_gradients_are_those_of_one_batch(leaves):
    model = make_model()
    mask = make_mask(model)
    oracle, twin = Oracle(model, mask, lr=LR), copy.deepcopy(model)
    model, optimizer = trainer(leaves, model, mask)
    for i in range(STEPS):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        (sum(loss_of(twin, 4 * i + j) for j in range(4)) / 4).backward()
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        for j in range(4):
            (loss_of(model, 4 * i + j) / 4).backward()
        optimizer.step()
        oracle.step(twin)
    for name, value in model.state_dict().items():
        assert_matches(value, oracle.params[name], terms=100)


@both_ways
def test_a_closure_is_an_ordinary_step(leaves):
    results = []
    for closed in (False, True):
        torch.manual_seed(0)
        model, optimizer = trainer(leaves)
        for i in range(STEPS):

            def closure(model=model, optimizer=optimizer, i=i):
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                return loss

            if closed:
                with torch.no_grad():  # as some loops call it
                    assert torch.is_tensor(optimizer.step(closure))
            else:
                closure()
                optimizer.step()
        results.append(weights(model))
    for a, b in zip(*(result.values() for result in results), strict=True):
        assert torch.equal(a, b)


@both_ways
@pytest.mark.parametrize("unscale", [False, True])
def test_accumulated_scaled_gradients_are_clipped_unscaled(leaves, unscale):
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model, optimizer = trainer(leaves)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for i in range(STEPS):
            optimizer.zero_grad()
            for j in range(2):
                scaler.scale(loss_of(model, 2 * i + j) / 2).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    for a, b in zip(*(result.values() for result in results), strict=True):
        assert_matches(b, a.double(), terms=16)
