"""check_numerics: lost updates are named once, and steps that write NaN or infinity taken back."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, LostUpdateWarning, SparseMask, train_only
from tests.support.optim import bits, copies, full_mask, loss_of, make_mask, make_model, train


def build(model, mask=None, lr=1e-3, **options):
    return FishSparseAdamW(
        model.named_parameters(), lr=lr, mask=mask, check_numerics=True, **options
    )


def snapshot(model, optimizer):
    """All bits of parameters and states."""
    state = {
        (name, key): bits(value).clone()
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }
    return {name: bits(p).clone() for name, p in model.named_parameters()} | state


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_without(dtype, masked):
    model = make_model(dtype)
    twin = copy.deepcopy(model)
    mask = make_mask(model) if masked else None
    plain = FishSparseAdamW(twin.named_parameters(), lr=1e-2, mask=mask)
    watched = build(model, mask, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostUpdateWarning)
        train(model, watched, 5)
    train(twin, plain, 5)
    assert_same(snapshot(model, watched), snapshot(twin, plain))


def expected_losses(model, before, optimizer, mask):
    """By name: how many selected entries kept their bits, and how many there are."""
    counts = {}
    for name, param in model.named_parameters():
        chosen = mask[name].long()
        same = param.flatten()[chosen] == before[name].flatten()[chosen]
        moment = optimizer.state[param]["exp_avg"].flatten()
        if n := int((same & (moment != 0)).sum()):
            counts[name] = (n, len(chosen))
    return counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lost_updates_are_named_once_with_their_numbers(dtype):
    torch.manual_seed(0)
    model = make_model(dtype)
    mask = make_mask(model)
    optimizer = build(model, mask, lr=1e-4, weight_decay=0.0)
    loss_of(model, 0).backward()
    before = copies(model)
    with pytest.warns(LostUpdateWarning, match=r"train_only\(model, mask\)") as caught:
        optimizer.step()
    assert [w.category for w in caught] == [LostUpdateWarning]
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    expected = expected_losses(model, before, optimizer, mask)
    assert 2 <= len(expected) <= 5
    for name, (n, of) in expected.items():
        assert f"{n} of {of} entries of {name!r}" in text
    assert text.count(" entries of ") == len(expected)
    assert str(dtype) in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3, start=1)
        train(model, pickle.loads(pickle.dumps((model, optimizer)))[1], 1)
        copied, other = copy.deepcopy((model, optimizer))
        train(copied, other, 1)


def test_nothing_is_said_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, lr in ((torch.float32, 1e-12), (torch.bfloat16, 0.0), (torch.bfloat16, 1.0)):
            model = make_model(dtype)
            train(model, build(model, lr=lr), 1)
        model = make_model(torch.bfloat16)  # no gradient, no update
        optimizer = build(model)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        model = make_model(torch.bfloat16)
        mask = make_mask(model)
        train_only(model, mask)  # the leaves are float32
        train(model, build(model, mask, lr=1e-6), 3)


def test_unnamed_parameters_and_whole_ones_are_counted():
    model = nn.Linear(6, 3, bias=False).bfloat16()
    optimizer = FishSparseAdamW(model.parameters(), lr=1e-9, check_numerics=True)
    model(torch.ones(1, 6).bfloat16()).sum().backward()
    with pytest.warns(LostUpdateWarning, match=r"18 of 18 entries of 'a parameter of shape \[3, 6"):
        optimizer.step()


@pytest.mark.parametrize("way", ["whole", "masked", "leaves", "remasked", "transposed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_writes_no_finite_numbers_is_taken_back(way, value):
    """1e30 is finite, but its square is not."""
    model = make_model()
    if way == "transposed":
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
    mask = None if way == "whole" else make_mask(model)
    if way == "leaves":
        train_only(model, mask)
    optimizer = build(model, mask)
    train(model, optimizer, 2)
    if way == "remasked":
        optimizer.set_mask(make_mask(model, seed=1))
        train(model, optimizer, 1)
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    params = dict(model.named_parameters())
    broken = params["3.fishkern_leaves.weight" if way == "leaves" else "3.weight"]
    broken.grad.view(-1)[:] = value
    before, weights = snapshot(model, optimizer), copy.deepcopy(model.state_dict())
    cause = r"gradients are finite" if value == 1e30 else r"gradients of '3\S*weight'"
    with pytest.raises(RuntimeError, match=rf"of '3\S*weight'.*{cause}.*taken back.*GradScaler"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    broken.grad.view(-1)[:] = 0.5  # the next batch is trained as if nothing had been
    twin, other = copy.deepcopy((model, optimizer))
    for own, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.grad = own.grad
    optimizer.step()
    other.step()
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_a_leaf_whose_rounding_overflows_is_taken_back():
    model = nn.Linear(3, 2, bias=False).half()
    nn.init.constant_(model.weight, 64992.0)  # float16 ends at 65504
    mask = SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
    (leaf,) = train_only(model, mask).parameters()
    optimizer = build(model, mask, lr=2000.0, weight_decay=0.0)
    leaf.grad = torch.tensor([1.0, -1.0])
    with pytest.raises(RuntimeError, match=r"1 of 2 entries .*the gradients are finite"):
        optimizer.step()
    assert torch.equal(leaf, torch.full_like(leaf, 64992.0))
    assert (model.state_dict()["weight"] == 64992.0).all()


def test_the_first_step_is_taken_back_too():
    model = make_model()
    mask = make_mask(model)
    optimizer = build(model, mask)
    loss_of(model, 0).backward()
    before = copies(model)
    model[0].weight.grad[:] = torch.nan
    with pytest.raises(RuntimeError, match=r"NaN or infinity to (\d+) of \1 entries of '0.weight'"):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
        assert optimizer.state[param]["step"] == 0
        assert not optimizer.state[param]["exp_avg"].any()


def test_nan_outside_the_mask_is_no_matter():
    model = nn.Linear(3, 2, bias=False)
    mask = SparseMask({"weight": torch.tensor([1, 5])}, {"weight": (2, 3)})
    optimizer = build(model, mask)
    model.weight.grad = torch.tensor([[torch.nan, 1.0, torch.nan], [torch.nan, torch.nan, 1.0]])
    optimizer.step()
    assert model.weight.isfinite().all()


def test_capturable_is_refused_with_it():
    model = make_model()
    with pytest.raises(ValueError, match=r"check_numerics=True .* leave out capturable=True"):
        build(model, full_mask(model), capturable=True)
    groups = [{"params": list(model.named_parameters()), "capturable": True}]
    optimizer = FishSparseAdamW(groups, check_numerics=True)
    loss_of(model, 0).backward()
    before = copies(model)
    with pytest.raises(ValueError, match=r"check_numerics=True .* leave out capturable=True"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
