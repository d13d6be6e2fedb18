"""Moments in bfloat16 and in 8 bits: what is kept and comes back, and that it trains as float32."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fishkern import FishSparseAdamW, SparseMask, functional, train_only
from tests.support.optim import (
    bits,
    copies,
    kernel,  # noqa: F401  (a fixture)
    loss_of,
    make_mask,
    make_model,
    train,
)
from tests.support.problems import PROBLEMS
from tests.support.training import random_mask

KEPT = {
    torch.float32: {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    torch.bfloat16: {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
    torch.uint8: dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"), torch.uint8
    ),
}
NARROW = [torch.bfloat16, torch.uint8]
WAYS = ["whole", "masked", "leaves"]


def build(way, state_dtype, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = make_model(dtype)
    mask = None if way == "whole" else make_mask(model)
    if way == "leaves":
        train_only(model, mask)
    optimizer = FishSparseAdamW(
        model.named_parameters(), lr=1e-2, mask=mask, state_dtype=state_dtype, **options
    )
    return model, optimizer


def moments(optimizer):
    """By place and kind, in float32."""
    found = {}
    for i, entry in enumerate(optimizer.state.values()):
        for key in ("exp_avg", "exp_avg_sq"):
            signed, moment, scale = key == "exp_avg", entry[key], entry.get(f"{key}_scale")
            if moment.dtype != torch.float32:
                moment = functional.dequantize_moment(moment, scale, signed=signed)
            found[i, key] = moment
    return found


def assert_same(model, optimizer, other, its):
    """All bits of weights and states."""
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(bits(a), bits(b))
    for p, q in zip(optimizer.state.values(), its.state.values(), strict=True):
        assert {k: v.dtype for k, v in p.items()} == {k: v.dtype for k, v in q.items()}
        assert all(torch.equal(p[key], q[key]) for key in p)


def saved_and_loaded(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("state_dtype", KEPT)
@pytest.mark.parametrize("way", WAYS)
def test_states_hold_what_was_asked_for(state_dtype, way, kernel):  # noqa: F811
    model, optimizer = build(way, state_dtype)
    assert not optimizer.state
    train(model, optimizer, 1)
    wide_model, wide = build(way, torch.float32)
    train(wide_model, wide, 1)
    for param, other in zip(optimizer.state, wide.state, strict=True):
        entry, like = optimizer.state[param], wide.state[other]
        assert {k: v.dtype for k, v in entry.items() if k != "step"} == KEPT[state_dtype]
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[key].shape == like[key].shape
            if state_dtype == torch.uint8:
                assert entry[f"{key}_scale"].shape == (-(-entry[key].numel() // 32),)
    # The first step's update is made before anything is rounded.
    for a, b in zip(model.state_dict().values(), wide_model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for key, truth in moments(wide).items():  # the errors that functional's docstring names
        error = (moments(optimizer)[key] - truth).abs()
        largest = truth.abs().max() if truth.numel() else 0.0
        share = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.uint8: 2**-4}[state_dtype]
        rest = (2**-9 if key[1] == "exp_avg" else 2**-17) if state_dtype == torch.uint8 else 0.0
        assert (error <= share * truth.abs() + rest * largest).all()
    if state_dtype != torch.float32:
        assert any((moments(optimizer)[k] != truth).any() for k, truth in moments(wide).items())


def bytes_of(optimizer):
    """Of all the tensors that the optimizer keeps beside the parameters, each memory once."""
    tensors = [value for entry in optimizer.state.values() for value in entry.values()]
    tensors += [*optimizer.mask.values()]
    for plan in optimizer._plans.values():
        for batch in plan.batches:
            tensors += [*batch.indices, *(batch.layout or ())]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize(
    ("state_dtype", "bound"), [(torch.float32, 12), (torch.bfloat16, 8), (torch.uint8, 6.2)]
)
def test_bytes_per_selected_entry(state_dtype, bound):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    mask = random_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, state_dtype=state_dtype)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert {index.dtype for index in optimizer.mask.values()} == {torch.int32}
    small = 32 * len(mask)  # counts, offsets and the last blocks of the tensors
    assert bytes_of(optimizer) <= bound * mask.num_selected + small
    assert small < 0.01 * bound * mask.num_selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on_bit_for_bit(way, state_dtype, dtype):
    model, optimizer = build(way, state_dtype, dtype)
    train(model, optimizer, 4)
    checkpoint = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    other, its = build(way, state_dtype, dtype, seed=1)
    other.load_state_dict(checkpoint[0])
    its.load_state_dict(checkpoint[1])
    assert_same(model, optimizer, other, its)
    train(model, optimizer, 4, start=4)
    train(other, its, 4, start=4)
    assert_same(model, optimizer, other, its)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("way", WAYS)
def test_copies_and_pickles_go_on_bit_for_bit(way, state_dtype):
    model, optimizer = build(way, state_dtype)
    train(model, optimizer, 3)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 3, start=3)
    for other, its in twins:
        train(other, its, 3, start=3)
        assert_same(model, optimizer, other, its)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_states_by_name_and_states_made_for_loading(way, state_dtype):
    """torch.distributed.checkpoint steps with zero gradients and lr = 0 to make a state."""
    model, optimizer = build(way, state_dtype)
    untouched, its = build(way, state_dtype)
    get_state_dict(model, optimizer)
    train(model, optimizer, 3)
    train(untouched, its, 3)
    assert_same(model, optimizer, untouched, its)
    found = get_state_dict(model, optimizer)
    other, fresh = build(way, state_dtype, seed=1)
    set_state_dict(other, fresh, model_state_dict=found[0], optim_state_dict=found[1])
    train(model, optimizer, 2, start=3)
    train(other, fresh, 2, start=3)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("saved", KEPT)
@pytest.mark.parametrize("own", KEPT)
def test_a_checkpoint_of_another_state_dtype(saved, own):
    """bfloat16 goes into float32, which holds it; anything else is refused, and nothing changed."""
    model, optimizer = build("masked", saved)
    train(model, optimizer, 2)
    other, its = build("masked", own)
    train(other, its, 1)
    unchanged = copy.deepcopy(its)
    if own == saved or (own, saved) == (torch.float32, torch.bfloat16):
        its.load_state_dict(saved_and_loaded(optimizer.state_dict()))
        assert all(torch.equal(moments(its)[k], value) for k, value in moments(optimizer).items())
        train(other, its, 1)
        return
    wanted = rf"exp_avg of 0.weight is {saved} .*={own}: build it with state_dtype={saved}"
    with pytest.raises(ValueError, match=wanted):
        its.load_state_dict(optimizer.state_dict())
    assert_same(other, its, other, unchanged)


def test_damaged_scales_are_refused_and_nothing_changed():
    model, optimizer = build("masked", torch.uint8)
    train(model, optimizer, 1)
    checkpoint, unchanged = optimizer.state_dict(), copy.deepcopy(optimizer)
    for odd, said in (
        (None, "is missing"),
        (torch.zeros(1), r"is torch.float32 \[1\]"),
        (torch.zeros(9, dtype=torch.uint8), r"is torch.uint8 \[9\]"),
    ):
        damaged = copy.deepcopy(checkpoint)
        damaged["state"][0]["exp_avg_sq_scale"] = odd
        if odd is None:
            del damaged["state"][0]["exp_avg_sq_scale"]
        with pytest.raises(ValueError, match=rf"exp_avg_sq_scale of 0.weight {said}.*uint8 \[1\]"):
            optimizer.load_state_dict(damaged)
        assert_same(model, optimizer, model, unchanged)
    damaged = copy.deepcopy(checkpoint)
    damaged["state"][0]["max_exp_avg_sq"] = damaged["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"max_exp_avg_sq of 0.weight.*state_dtype=torch.float32"):
        optimizer.load_state_dict(damaged)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_what_has_no_narrow_moments_is_refused(state_dtype):
    for options, dtype, said in (
        ({"amsgrad": True}, torch.float32, "amsgrad=True"),
        ({}, torch.float64, "0.weight is in torch.float64"),
    ):
        model, optimizer = build("masked", state_dtype, dtype, **options)
        loss_of(model, 0).backward()
        before = copies(model)
        with pytest.raises(ValueError, match=rf"{said}.*state_dtype=torch.float32"):
            optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert not optimizer.state


@pytest.mark.parametrize("state_dtype", NARROW)
def test_another_mask_is_refused_once_there_are_moments(state_dtype):
    model, optimizer = build("masked", state_dtype)
    optimizer.set_mask(make_mask(model, seed=1))  # nothing has to be moved yet
    train(model, optimizer, 1)
    unchanged = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"only with state_dtype=torch.float32"):
        optimizer.set_mask(make_mask(model, seed=2))
    assert_same(model, optimizer, model, unchanged)
    model = make_model()
    mask, second = make_mask(model), make_mask(model, seed=2)
    handle = train_only(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, state_dtype=state_dtype)
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"only with state_dtype=torch.float32"):
        handle.set_mask(second, optimizer)
    train(model, optimizer, 1)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_groups_added_and_gradients_missing(state_dtype):
    """A parameter that has no gradient in a step keeps all its bits, and its own count."""
    torch.manual_seed(0)
    model = make_model()
    pairs = list(model.named_parameters())
    optimizer = FishSparseAdamW(pairs[:2], lr=1e-2, state_dtype=state_dtype)
    train(model, optimizer, 1)
    optimizer.add_param_group({"params": pairs[2:], "lr": 1e-3})
    train(model, optimizer, 1, start=1)
    kept = copy.deepcopy(optimizer.state[pairs[0][1]])
    loss_of(model, 2).backward()
    pairs[0][1].grad = None
    optimizer.step()
    entries = [optimizer.state[param] for _, param in pairs]
    assert [int(entry["step"]) for entry in entries] == [2, 3, 2, 2, 2, 2]
    assert all(torch.equal(entries[0][key], kept[key]) for key in kept)
    assert all(entry["exp_avg"].dtype == state_dtype for entry in entries)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_nothing_outside_the_mask_changes(state_dtype):
    model, optimizer = build("masked", state_dtype)
    mask, before = make_mask(model), copies(model)
    train(model, optimizer, 3)
    for name, param in model.named_parameters():
        outside = ~mask.dense(name)
        assert torch.equal(bits(param[outside]), bits(before[name][outside]))
        assert not torch.equal(param, before[name]) or not len(mask[name])


@pytest.mark.parametrize("state_dtype", NARROW)
def test_capturable_steps_are_the_same(state_dtype):
    runs = [build("masked", state_dtype, capturable=flag) for flag in (False, True)]
    for model, optimizer in runs:
        train(model, optimizer, 3)
    assert_same(*runs[0], *runs[1])
    model, optimizer = runs[1]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    train(model, optimizer, 1)  # what a GradScaler asks for where it found an overflow
    assert_same(*runs[0], model, optimizer)


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("way", WAYS)
def test_check_numerics_takes_steps_back(way, state_dtype):
    model, optimizer = build(way, state_dtype, check_numerics=True)
    train(model, optimizer, 2)
    other, its = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[:] = torch.inf
    with pytest.raises(RuntimeError, match="taken back"):
        optimizer.step()
    assert_same(model, optimizer, other, its)


@pytest.mark.parametrize(
    ("state_dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.uint8, 0.05)]
)
def test_a_small_bert_learns_as_with_float32(state_dtype, tolerance):
    """The loss after 150 steps, in which it falls to a third, over three seeds."""
    problem = PROBLEMS["bert"]

    def run(seed, dtype):
        torch.manual_seed(seed)
        model = problem.model().eval()  # no dropout
        mask = random_mask(model, density=0.3, seed=seed)
        batches = [problem.batch(8, 6) for _ in range(8)]
        optimizer = FishSparseAdamW(model.named_parameters(), lr=3e-3, mask=mask, state_dtype=dtype)

        def loss():
            with torch.no_grad():
                return sum(problem.loss(model, batch).item() for batch in batches) / 64

        start = loss()
        for i in range(150):
            optimizer.zero_grad()
            (problem.loss(model, batches[i % 8]) / 8).backward()
            optimizer.step()
        return start, loss()

    for seed in range(3):
        start, wide = run(seed, torch.float32)
        _, narrow = run(seed, state_dtype)
        assert wide < 0.5 * start
        assert narrow != wide
        assert abs(narrow - wide) < tolerance * wide


def test_rounding_is_fair_where_updates_are_far_below_a_unit():
    """Second moments change by a thousandth a step; rounded to nearest, they would stand still."""
    mask = SparseMask({"weight": torch.arange(0, 4096, 2)}, {"weight": (64, 64)})
    ends = {}
    for dtype in KEPT:
        model = nn.Linear(64, 64, bias=False)
        optimizer = FishSparseAdamW(model.named_parameters(), lr=0.0, mask=mask, state_dtype=dtype)
        for i in range(300):
            model.weight.grad = torch.full((64, 64), 1.0 if i < 100 else 0.1)
            optimizer.step()
        ends[dtype] = moments(optimizer)[0, "exp_avg_sq"].mean().item()
    assert ends[torch.float32] > 0.05
    for dtype in NARROW:
        assert abs(ends[dtype] / ends[torch.float32] - 1) < 0.02
