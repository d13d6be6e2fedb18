"""With a mask: AdamW on masked gradients inside it, and not one changed bit outside."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fishkern.optim import FishSparseAdamW
from fishkern.selection.masks import SparseMask
from tests.support.optim import (
    Oracle,
    bits,
    copies,
    kernel,  # noqa: F401
    loss_of,
    make_mask,
    make_model,
    train,
)
from tests.support.tolerances import assert_matches

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.5, "lr": 1e-2},
        {"betas": (0.5, 0.9), "eps": 1e-4},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_matches_the_float64_oracle(options):
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, **options)
    oracle = Oracle(model, mask, **options)
    steps = 100
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
        oracle.step(model)
    for name, param in model.named_parameters():
        assert_matches(param.detach(), oracle.params[name], terms=steps)
        index = mask[name].long()
        for key in ("exp_avg", "exp_avg_sq"):
            truth = oracle.adamw.state[oracle.params[name]][key].flatten()[index]
            assert_matches(optimizer.state[param][key].flatten(), truth, terms=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outside_the_mask_every_bit_stays(dtype):
    model = make_model(dtype)
    mask = make_mask(model)
    before = copies(model)
    train(model, FishSparseAdamW(model.named_parameters(), lr=0.1, weight_decay=0.5, mask=mask), 5)
    for name, param in model.named_parameters():
        outside = ~mask.dense(name)
        assert torch.equal(bits(param[outside]), bits(before[name][outside]))
        inside = mask.dense(name)
        assert (param[inside] != before[name][inside]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_state(dtype):
    model = make_model(dtype)
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    for i in range(10):
        oracle = Oracle(model, mask, lr=1e-2)
        for (name, param), own in zip(
            model.named_parameters(), oracle.params.values(), strict=True
        ):
            if optimizer.state.get(param):
                places, state = mask.dense(name), oracle.adamw.state[own]
                state["step"] = optimizer.state[param]["step"].clone()
                for key in ("exp_avg", "exp_avg_sq"):
                    assert optimizer.state[param][key].dtype == torch.float32
                    state[key] = torch.zeros_like(own)
                    state[key][places] = optimizer.state[param][key].double().flatten()
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
        oracle.step(model)
        for name, param in model.named_parameters():
            assert_matches(param.detach(), oracle.params[name], dtype=dtype)
            moment = oracle.adamw.state[oracle.params[name]]["exp_avg"][mask.dense(name)]
            assert_matches(optimizer.state[param]["exp_avg"].flatten(), moment)


def test_float64_parameters_are_trained_in_float64():
    model = make_model(torch.float64)
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    oracle = Oracle(model, mask)
    for i in range(20):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
        oracle.step(model)
    for name, param in model.named_parameters():
        assert_matches(param.detach(), oracle.params[name], dtype=torch.float64)


def test_strided_parameters():
    param = torch.nn.Parameter(torch.randn(4, 6).t())
    before = param.detach().clone()
    mask = SparseMask({"w": torch.tensor([1, 7, 23])}, {"w": (6, 4)})
    optimizer = FishSparseAdamW([("w", param)], mask=mask, lr=0.1)
    param.grad = torch.randn(6, 4)
    optimizer.step()
    changed = (param != before).flatten().nonzero().flatten()
    assert changed.tolist() == [1, 7, 23]


def test_state_takes_twelve_bytes_per_entry_with_its_index():
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    assert not optimizer.state
    train(model, optimizer, 2)
    assert len(optimizer.state) == len(list(model.parameters()))
    storages = {}
    for entry in optimizer.state.values():
        for value in entry.values():
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    indices = sum(index.numel() * index.element_size() for index in optimizer.mask.values())
    assert sum(storages.values()) + indices <= 12 * mask.num_selected + 4 * len(mask)
    for name, param in model.named_parameters():
        k = mask[name].numel()
        whole = k == param.numel()
        assert optimizer.state[param]["exp_avg"].shape == (param.shape if whole else (k,))
        assert optimizer.state[param]["step"].shape == ()


def test_bound_mask_serves_loops_without_names():
    named, bare = make_model(), make_model()
    bare.load_state_dict(named.state_dict())
    mask = make_mask(named)
    train(named, FishSparseAdamW(named.named_parameters(), mask=mask), 5)
    params = list(bare.parameters())
    groups = [{"params": params[:3]}, {"params": iter(params[3:])}]
    optimizer = FishSparseAdamW(groups, mask=mask.bind(bare))
    train(bare, optimizer, 5)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight"]
    for a, b in zip(named.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_are_matched_without_wrappers_prefixes():
    model = make_model()
    mask = make_mask(model)
    pairs = [(f"module._orig_mod.{name}", param) for name, param in model.named_parameters()]
    optimizer = FishSparseAdamW(pairs, mask=mask)
    assert optimizer.param_groups[0]["param_names"] == list(mask)


@pytest.mark.parametrize("unlisted", ["train", "freeze"])
def test_unlisted(unlisted):
    model = make_model()
    known = make_mask(model)
    mask = SparseMask({"0.weight": known["0.weight"]}, {"0.weight": (8, 6)})
    before = copies(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, unlisted=unlisted)
    train(model, optimizer, 3)
    for name, param in model.named_parameters():
        changed = int((param != before[name]).sum())
        if name == "0.weight":
            assert changed == mask[name].numel()
        else:
            assert changed == (param.numel() if unlisted == "train" else 0)
    optimizer.zero_grad()  # also of frozen ones, which clip_grad_norm_ would else go on counting
    assert all(param.grad is None for param in model.parameters())


def test_frozen_parameters_outside_the_mask_are_left_out():
    model = make_model()
    model[0].requires_grad_(False)
    mask = make_mask(model)
    part = {n: mask[n] for n in mask if not n.startswith("0.")}
    optimizer = FishSparseAdamW(
        model.named_parameters(), mask=SparseMask(part, {n: mask.shapes[n] for n in part})
    )
    assert optimizer.param_groups[0]["param_names"] == list(part)
    train(model, optimizer, 2)


def test_a_leaf_stands_for_its_dense_parameter():
    model = make_model()
    mask = make_mask(model)
    weight = model[3].weight
    index = mask["3.weight"].long()
    leaf = torch.nn.Parameter(weight.detach().flatten()[index].clone())
    weight.requires_grad_(False)
    before = leaf.detach().clone()
    pairs = [*model.named_parameters(), ("3.fishkern_leaves.weight", leaf)]
    optimizer = FishSparseAdamW(
        [{"params": pairs[:-1]}, {"params": pairs[-1:], "lr": 0.1}], mask=mask
    )
    assert "3.weight" not in optimizer.param_groups[0]["param_names"]
    loss_of(model, 0).backward()
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    assert optimizer.state[leaf]["exp_avg"].shape == leaf.shape
    torch.testing.assert_close(leaf, before * (1 - 0.1 * 0.01) - 0.1)
    other = FishSparseAdamW([{"params": pairs[:-1]}, {"params": pairs[-1:], "lr": 0.1}], mask=mask)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[leaf]["exp_avg"], optimizer.state[leaf]["exp_avg"])


def test_groups_may_be_added_until_the_first_step():
    model = make_model()
    mask = make_mask(model)
    pairs = list(model.named_parameters())
    optimizer = FishSparseAdamW(pairs[:3], mask=mask)
    optimizer.add_param_group({"params": pairs[3:], "lr": 0.0})
    before = copies(model)
    train(model, optimizer, 2)
    assert torch.equal(before["3.bias"], model[3].bias)
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_empty_groups_are_kept():
    model = make_model()
    mask = make_mask(model)
    groups = [{"params": []}, {"params": model.named_parameters()}, {"params": iter(())}]
    optimizer = FishSparseAdamW(groups, mask=mask)
    train(model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 6, 0]


def test_accumulation_and_clipping_see_dense_gradients():
    model = make_model()
    mask = make_mask(model)
    oracle = Oracle(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    for i in range(20):
        optimizer.zero_grad()
        for j in range(3):
            (loss_of(model, 3 * i + j) / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        oracle.step(model)
    for name, param in model.named_parameters():
        assert_matches(param.detach(), oracle.params[name], terms=20)


def test_parameters_on_which_no_gradient_arrives_wait():
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    for i in range(4):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        if i % 2:
            model[0].weight.grad = None
        optimizer.step()
    steps = [int(optimizer.state[param]["step"]) for param in model.parameters()]
    assert steps == [2, 4, 4, 4, 4, 4]
    optimizer.zero_grad()
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in model.parameters()] == steps


def test_step_hooks_and_closure():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        seen.append("closure")
        return loss

    expected = loss_of(model, 0).item()
    assert optimizer.step(closure).item() == expected
    assert seen == ["pre", "closure", "post"]


def test_step_seen_by_global_hooks_and_by_the_profiler():
    """The wrapper that torch puts around every step is only left out where nobody looks."""
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    loss_of(model, 0).backward()
    optimizer.step()
    seen = []
    with torch.profiler.profile(acc_events=True) as profile:  # else torch 2.11 warns
        optimizer.step()
    assert "Optimizer.step#FishSparseAdamW.step" in {event.key for event in profile.key_averages()}
    hook = register_optimizer_step_post_hook(lambda *_: seen.append("post"))
    try:
        optimizer.step()
    finally:
        hook.remove()
    assert seen == ["post"]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    assert seen == ["post"]
