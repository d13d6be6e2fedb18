"""Each value exists in its leaf and in its weight: whoever writes one, both hold it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from fishkern.training import leaves
from tests.support.optim import make_mask, make_model
from tests.support.training import (
    distance,
    random_mask,
    weights,
)


def test_strict_loading_reaches_the_leaves(case):
    problem, model = case
    mask, start = random_mask(model), weights(model)
    handle = train_only(model, mask)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    problem.loss(model, problem.batch()).backward()
    optimizer.step()
    trained = weights(model)
    assert distance(trained, start) > 0
    model.load_state_dict(start, strict=True)
    for name, leaf in handle.named_parameters():
        owner = name.replace("fishkern_leaves.", "")
        assert torch.equal(leaf, start[owner].flatten()[mask[owner].long()])
    assert distance(weights(model), start) == 0
    model.load_state_dict(trained, strict=True, assign=True)
    assert distance(weights(model), trained) == 0
    problem.loss(model, problem.batch()).backward()  # the assigned weights are frozen, too
    dense = set(model.parameters()) - set(handle.parameters())
    assert not any(p.requires_grad for p in dense)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_attached_and_independent(case, duplicate):
    problem, model = case
    mask = random_mask(model)
    train_only(model, mask)
    twin = duplicate(model)
    assert attached(twin) is not None
    assert attached(twin) is not attached(model)
    before = weights(model)
    optimizer = torch.optim.SGD(attached(twin).parameters(), lr=0.1)
    problem.loss(twin, problem.batch()).backward()
    assert all(leaf.grad is None for leaf in attached(model).parameters())
    optimizer.step()
    assert distance(weights(model), before) == 0
    assert distance(weights(twin), before) > 0


class Tuner(nn.Sequential):
    """It says itself what of it is saved, as Lightning's modules do."""

    loop: object = None

    def __getstate__(self):
        return {**self.__dict__, "loop": None}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_that_says_what_of_it_is_copied(duplicate):
    model = Tuner(nn.Linear(4, 4))
    train_only(model, random_mask(model))
    model.loop = (x for x in ())  # which nothing can copy
    twin = duplicate(model)
    assert attached(twin) is not attached(model)
    assert type(twin) is type(model)
    attached(twin).remove()
    assert type(twin) is Tuner


@pytest.mark.parametrize("write", ["in_place", "data", "parameter"])
@pytest.mark.parametrize("then", ["forward", "state_dict", "remove", "score", "to"])
def test_a_weight_that_others_write_keeps_what_they_wrote(write, then):
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    weight = model._parameters["weight"]
    if write == "in_place":
        with torch.no_grad():
            weight.fill_(7.0)
    elif write == "data":  # as PEFT merges adapters: no version counter moves
        weight.data.fill_(7.0)
    else:
        model.weight = nn.Parameter(torch.full((4, 4), 7.0))
    if then == "forward":
        model(torch.randn(1, 4))
    elif then == "state_dict":
        model.state_dict()
    elif then == "remove":
        handle.remove()
    elif then == "to":
        model.to(torch.float64)
    else:
        batch = (torch.randn(3, 4), torch.randn(3, 4))
        fishkern.estimate_fisher(
            model, [batch], loss_fn=lambda m, b: (m(b[0]) - b[1]).square().sum(1), progress=False
        )
    assert model._parameters["weight"].tolist() == [[7.0] * 4] * 4


def test_leaves_written_by_hand_count_in_training_mode():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    with torch.no_grad():
        leaf.fill_(3.0)
    model(torch.randn(1, 4))
    assert model._parameters["weight"].flatten()[[2, 9]].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("make", [torch.optim.SGD, FishSparseAdamW])
def test_a_step_keeps_what_was_written_to_other_leaves(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shapes = {"0.weight": (4, 4), "1.weight": (4, 4)}
    mask = SparseMask(dict.fromkeys(shapes, torch.tensor([2, 9])), shapes)
    first, second = train_only(model, mask, unlisted="freeze").parameters()
    optimizer = make([first], lr=0.1)  # it knows nothing of the second leaf
    model(torch.randn(3, 4)).sum().backward()
    with torch.no_grad():
        second.fill_(3.0)
    optimizer.step()
    model(torch.randn(1, 4))
    assert second.tolist() == [3.0, 3.0]
    assert model[1]._parameters["weight"].flatten()[[2, 9]].tolist() == [3.0, 3.0]
    assert torch.equal(model[0]._parameters["weight"].flatten()[[2, 9]], first.detach())


def test_exchanged_leaves_count_in_eval_mode():
    model = nn.Linear(4, 4).eval()
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    handle = train_only(model, mask, unlisted="freeze")
    (leaf,) = handle.parameters()
    leaf.data.fill_(3.0)  # as a moving average would
    model(torch.randn(1, 4))
    assert model.weight.flatten()[[2, 9]].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", ["copy_", "data"])
@pytest.mark.parametrize("copy", ["leaf", "weight"])
def test_what_is_written_right_after_a_step_holds(copy, write, dtype):
    """The step has written both copies itself: neither is taken for one that others wrote."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False).to(dtype)
    mask = SparseMask({"weight": torch.arange(0, 16, 3)}, {"weight": (4, 4)})
    handle = train_only(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.1)
    leaf, values = next(handle.parameters()), torch.arange(6.0) + 1
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 4, dtype=dtype)).square().sum().backward()
        optimizer.step()
    weight = model._parameters["weight"]
    flat, places = (leaf, slice(None)) if copy == "leaf" else (weight.view(-1), mask["weight"])
    with torch.no_grad():
        (flat.data if write == "data" else flat)[places] = values.to(flat.dtype)
    model.eval()
    model(torch.ones(1, 4, dtype=dtype))
    assert torch.equal(leaf.detach(), values)
    assert torch.equal(weight.detach().view(-1)[mask["weight"]].float(), values)


def test_a_tied_weight_written_right_after_a_step_holds():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    mask = SparseMask({"0.weight": torch.arange(0, 16, 3)}, {"0.weight": (4, 4)})
    handle = train_only(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, lr=0.1)
    model[1](model[0](torch.ones(1, 4))).sum().backward()
    optimizer.step()
    with torch.no_grad():
        next(handle.parameters()).fill_(7.0)
    handle.sync()
    assert model[0]._parameters["weight"].view(-1)[::3].tolist() == [7.0] * 6


def test_what_is_written_after_either_of_two_optimizers_steps_holds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    indices = {f"{i}.weight": torch.arange(0, 16, 3) for i in range(2)}
    mask = SparseMask(indices, dict.fromkeys(indices, (4, 4)))
    handle = train_only(model, mask)
    leaves = list(handle.named_parameters())
    optimizers = [FishSparseAdamW(some, lr=0.1) for some in (leaves, leaves[:1], leaves[::-1])]
    for optimizer in (*optimizers, *optimizers):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for _, leaf in leaves[:1]:
            values = torch.randn(6)
            leaf.data.copy_(values)
        handle.sync()
        assert torch.equal(model[0]._parameters["weight"].view(-1)[::3], values)


def test_a_pickled_model_has_each_value_once():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    indices = {name: torch.arange(0, 4096, 4) for name, _ in model.named_parameters()}
    mask = SparseMask(indices, dict.fromkeys(indices, (64, 64)))
    train_only(model, mask)
    before = len(pickle.dumps(model))
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert len(pickle.dumps(model)) < 1.01 * before


def test_what_agrees_is_compared_again_when_a_version_moves(monkeypatch):
    """As on a GPU after a step of FishSparseAdamW, which writes leaves and weights at once."""
    model = make_model()
    handle = fishkern.train_only(model, make_mask(model))
    optimizer = fishkern.FishSparseAdamW(handle.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    owners = [module for module in model.modules() if isinstance(module, leaves.Leaves)]
    leaves.mark_settled(list(handle.parameters()))
    compared = []
    gather = leaves.gather
    monkeypatch.setattr(leaves, "gather", lambda *args: compared.append(args) or gather(*args))
    for owner in owners:
        owner.sync(thorough=False)
    assert not compared
    with torch.no_grad():
        model[0]._parameters["weight"].add_(1.0)
    for owner in owners:
        owner.sync(thorough=False)
    assert len(compared) == 1
    index = leaves.home_of(dict(handle.named_parameters())["0.fishkern_leaves.weight"]).indices
    found = model[0]._parameters["weight"].detach().flatten()[index.long()]
    assert torch.equal(dict(handle.named_parameters())["0.fishkern_leaves.weight"], found)
