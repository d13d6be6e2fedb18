"""Leaves keep float32 values of narrower weights, also through checkpoints."""

import copy
import io
import re
import warnings

import pytest
import torch
from torch import nn

from fishkern import FishSparseAdamW, LostUpdateWarning, SparseMask, attached, train_only
from tests.support.problems import PROBLEMS
from tests.support.tolerances import assert_matches
from tests.support.training import distance, random_mask, weights


def test_cast_to_bfloat16_keeps_float32_leaves(case):
    problem, model = case
    mask = random_mask(model)
    handle = train_only(model, mask)
    values = [leaf.detach().clone() for leaf in handle.parameters()]
    model.to(torch.bfloat16)
    assert all(leaf.dtype == torch.float32 for leaf in handle.parameters())
    for leaf, value in zip(handle.parameters(), values, strict=True):
        assert torch.equal(leaf, value)
    leaves = {id(leaf) for leaf in handle.parameters()}
    assert {p.dtype for p in model.parameters() if id(p) not in leaves} == {torch.bfloat16}
    optimizer = FishSparseAdamW(model.named_parameters(), lr=1e-5, mask=mask)
    problem.loss(model, problem.batch()).backward()
    optimizer.step()
    state = model.state_dict()
    for name, leaf in handle.named_parameters():  # the weight is the leaf's rounding
        owner = name.replace("fishkern_leaves.", "")
        chosen = state[owner].flatten()[mask[owner].long()]
        assert torch.equal(chosen, leaf.detach().to(torch.bfloat16))
    problem.loss(model, problem.batch())  # a forward does not round the leaves
    moved = [leaf.detach().to(torch.bfloat16).float() for leaf in handle.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, handle.parameters(), strict=True))


def test_float64_weights_have_float64_leaves():
    model = nn.Linear(4, 4).double()
    before = model.weight.detach().clone()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    assert [leaf.dtype for leaf in handle.parameters()] == [torch.float64]
    handle.remove()
    assert torch.equal(model.weight, before)
    handle = train_only(model, mask, unlisted="freeze")
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.1, weight_decay=0.0)
    model(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    change = (model._parameters["weight"] - before).flatten()
    assert_matches(change[[2, 9]], torch.tensor([-0.1, -0.1]).double())
    assert change.count_nonzero() == 2


def bf16_problem():
    problem = PROBLEMS["bert"]
    torch.manual_seed(1)
    model = problem.model().eval().to(torch.bfloat16)
    return problem, model, random_mask(model), [problem.batch() for _ in range(6)]


def steps(problem, model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        problem.loss(model, batch).backward()
        optimizer.step()


def fish(model, mask):
    train_only(model, mask)
    return FishSparseAdamW(model.named_parameters(), lr=1e-4, mask=mask)


def saved(value):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_bits(a, b):
    assert distance(weights(a), weights(b)) == 0
    for one, other in zip(attached(a).parameters(), attached(b).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_resumed_bfloat16_run_goes_on_bit_for_bit(optimizer_first):
    problem, model, mask, batches = bf16_problem()
    twin = copy.deepcopy(model)
    optimizer = fish(model, mask)
    steps(problem, model, optimizer, batches[:3])
    checkpoint = saved([model.state_dict(), optimizer.state_dict()])
    resumed = fish(twin, mask)
    if optimizer_first:
        resumed.load_state_dict(checkpoint[1])
        twin.load_state_dict(checkpoint[0])
    else:
        twin.load_state_dict(checkpoint[0])
        resumed.load_state_dict(checkpoint[1])
    assert_equal_bits(model, twin)
    assert any(not torch.equal(p, p.bfloat16().float()) for p in attached(twin).parameters())
    steps(problem, model, optimizer, batches[3:])
    steps(problem, twin, resumed, batches[3:])
    assert_equal_bits(model, twin)


def test_a_stock_optimizer_resumes_from_the_rounded_weights():
    problem, model, mask, batches = bf16_problem()
    twin = copy.deepcopy(model)
    handle = train_only(model, mask)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4)
    steps(problem, model, optimizer, batches[:3])
    checkpoint = saved(model.state_dict())
    other = train_only(twin, mask)
    twin.load_state_dict(checkpoint)
    pairs = list(zip(handle.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_masters_are_in_checkpoints_of_narrower_weights_alone():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = nn.Linear(4, 4).to(dtype)
        mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
        handle = train_only(model, mask, unlisted="freeze")
        optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
        assert optimizer.state_dict()["state"] == {}
        model(torch.ones(1, 4, dtype=dtype)).sum().backward()
        optimizer.step()
        entry, (leaf,) = optimizer.state_dict()["state"][0], handle.parameters()
        assert ("master" in entry) == (dtype != torch.float32)
        assert "master" not in optimizer.state[leaf]
        if "master" in entry:
            assert entry["master"].dtype == torch.float32
            assert torch.equal(entry["master"], leaf)
            optimizer.load_state_dict(saved(optimizer.state_dict()))
            optimizer.step()
        handle.remove()
        optimizer.state_dict()  # can still be saved


def test_a_master_of_another_length_is_refused_and_nothing_changed():
    model = nn.Linear(4, 4).bfloat16()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    optimizer.step()
    checkpoint, before = optimizer.state_dict(), leaf.detach().clone()
    checkpoint["state"][0]["master"] = torch.zeros(3)
    checkpoint["state"][0]["step"] = torch.tensor(7.0)
    with pytest.raises(ValueError, match=r"shape \[3\].*\[2\].*same mask"):
        optimizer.load_state_dict(checkpoint)
    assert torch.equal(leaf, before)
    assert optimizer.state[leaf]["step"] == 1
    del checkpoint["state"][0]["master"]  # of another optimizer: the weights' values then
    optimizer.load_state_dict(checkpoint)
    assert torch.equal(leaf, before)


def test_autocast_and_half_keep_float32_leaves_and_gradients():
    problem = PROBLEMS["bert"]
    model = problem.model().eval()
    handle = train_only(model, random_mask(model))
    with torch.autocast("cpu", torch.bfloat16):
        problem.loss(model, problem.batch()).backward()
    assert {leaf.grad.dtype for leaf in handle.parameters()} == {torch.float32}
    model.half()
    assert {leaf.dtype for leaf in handle.parameters()} == {torch.float32}
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_two_thousand_small_steps_of_bfloat16_weights_follow_the_float32_run():
    """Steps far below a rounding add up in the leaves; the plain way loses them, and says so."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    mask = SparseMask({"weight": torch.arange(0, 64, 2)}, {"weight": (8, 8)})
    torch.manual_seed(0)
    start = nn.Linear(8, 8, bias=False).bfloat16()
    ends, said = {}, {}
    for way in ("float32", "leaves", "plain"):
        model = copy.deepcopy(start)
        model = model.float() if way == "float32" else model
        if way == "leaves":
            train_only(model, mask)
        optimizer = FishSparseAdamW(
            model.named_parameters(), lr=1e-5, mask=mask, weight_decay=0.0, check_numerics=True
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2000):
                optimizer.zero_grad()
                (model(x.to(model.weight.dtype)).float() - x).square().mean().backward()
                optimizer.step()
        said[way] = [str(w.message) for w in caught if w.category is LostUpdateWarning]
        ends[way] = model.state_dict()["weight"].float().flatten()[mask["weight"].long()]
    moved = (ends["float32"] - start.weight.float().flatten()[mask["weight"].long()]).abs().mean()
    leaves, plain = ((ends[way] - ends["float32"]).abs().mean() for way in ("leaves", "plain"))
    assert moved > 1e-2
    assert leaves < 0.1 * moved
    assert plain > 0.5 * moved
    assert {way: len(texts) for way, texts in said.items()} == {
        "float32": 0,
        "leaves": 0,
        "plain": 1,
    }
    assert re.search(r"\d\d of 32 entries of 'weight'.*train_only", said["plain"][0])
