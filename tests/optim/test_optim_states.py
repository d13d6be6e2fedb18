"""Whoever writes to a state between two steps is heard: torch's AdamW is the oracle."""

import copy
import io
import weakref

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path, tree_map

from fishkern.optim import FishSparseAdamW
from fishkern.optim.states import Entry, Memo, States
from fishkern.selection.masks import SparseMask
from tests.support.optim import full_mask, make_mask, make_model, train
from tests.support.tolerances import assert_matches

KEYS = ("step", "exp_avg", "exp_avg_sq")


def first(optimizer):
    """The state of the first parameter."""
    return next(iter(optimizer.state.values()))


def values(optimizer, factor):
    return {key: first(optimizer)[key] * factor for key in KEYS}


def in_order(optimizer, entries):
    optimizer.state.update(zip(list(optimizer.state), entries, strict=True))


def set_items(optimizer):
    for key, value in values(optimizer, 2).items():
        first(optimizer)[key] = value


def update(optimizer):
    first(optimizer).update(values(optimizer, 2))


def merge(optimizer):
    entry = first(optimizer)
    entry |= values(optimizer, 2)


def pop_and_default(optimizer):
    new = values(optimizer, 2)
    for key in KEYS:
        first(optimizer).pop(key)
        first(optimizer).setdefault(key, new[key])


def delete(optimizer):
    new = values(optimizer, 2)
    for key in KEYS:
        del first(optimizer)[key]
    first(optimizer).update(new)


def clear_one(optimizer):
    first(optimizer).clear()


def clear_all(optimizer):
    optimizer.state.clear()


def forget_one(optimizer):
    optimizer.state.pop(next(iter(optimizer.state)))


def popitem(optimizer):
    optimizer.state.popitem()


def plain_dicts(optimizer):
    in_order(optimizer, [dict(entry) for entry in optimizer.state.values()])
    first(optimizer).update(values(optimizer, 2))


def plain_state(optimizer):
    """As where a framework puts a dict of its own there."""
    optimizer.state = dict(optimizer.state.items())
    optimizer.state[next(iter(optimizer.state))] = values(optimizer, 2)


def in_place(optimizer):
    for value in first(optimizer).values():
        value.mul_(2)


def nothing(optimizer):
    copy.deepcopy(optimizer.state_dict())


WAYS = [
    set_items,
    update,
    merge,
    pop_and_default,
    delete,
    clear_one,
    clear_all,
    forget_one,
    popitem,
    plain_dicts,
    plain_state,
    in_place,
    nothing,
]


@pytest.mark.parametrize("partly", [False, True], ids=["all", "one without gradient"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_to_a_state_is_what_the_next_step_uses(way, partly):
    torch.manual_seed(0)
    model = make_model()
    other = copy.deepcopy(model)
    if partly:
        for each in (model, other):
            each[0].bias.requires_grad_(False)
    optimizers = (
        FishSparseAdamW(model.named_parameters(), lr=1e-2, mask=full_mask(model)),
        torch.optim.AdamW(other.named_parameters(), lr=1e-2, foreach=False),
    )
    for each, optimizer in zip((model, other), optimizers, strict=True):
        train(each, optimizer, 3)
        way(optimizer)
        train(each, optimizer, 2, start=3)
        way(optimizer)  # also what was there before was of somebody else
        train(each, optimizer, 2, start=5)
    for param, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_matches(param.detach(), expected.detach().double(), terms=64)


def test_every_method_that_writes_to_a_dict_tells():
    ways = {
        "__setitem__": ("a", 1),
        "__delitem__": ("a",),
        "__ior__": ({"a": 2},),
        "update": ({"a": 2},),
        "setdefault": ("b", 2),
        "pop": ("a",),
        "popitem": (),
        "clear": (),
    }
    reading = {
        *("copy", "fromkeys", "get", "items", "keys", "values"),
        *(name for name in dir(object) if name not in ways),
        *("__class_getitem__", "__contains__", "__getitem__", "__iter__", "__len__", "__or__"),
        *("__reversed__", "__ror__"),
    }
    assert set(dir(dict)) == set(ways) | reading  # a method that is new in Python is looked at here
    memo = Memo()
    for kind in (Entry, lambda held: States(Entry, held)):
        for name, args in ways.items():
            held = kind({"a": 1})
            memo.keep(name)
            assert held["a"] == 1
            assert memo.value == name
            getattr(held, name)(*args)
            assert memo.value is None
    missing = States(Entry)
    memo.keep(1)
    assert type(missing["a"]) is Entry
    assert memo.value is None


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_exchanged_is_freed(state_dtype):
    """As where moments are kept elsewhere between two steps."""
    torch.manual_seed(0)
    model = make_model()
    model[0].bias.requires_grad_(False)  # so that float32 moments are not packed either
    optimizer = FishSparseAdamW(
        model.named_parameters(), mask=full_mask(model), state_dtype=state_dtype
    )
    train(model, optimizer, 3)
    old = [weakref.ref(value) for entry in optimizer.state.values() for value in entry.values()]
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.clone()
    del entry, value
    assert [ref for ref in old if ref() is not None] == []


def test_moments_stay_packed_behind_a_parameter_without_entries():
    model = make_model()
    shapes = {name: param.shape for name, param in model.named_parameters()}
    every = {name: torch.arange(shape.numel()) for name, shape in shapes.items()}
    mask = SparseMask(every | {"0.weight": torch.arange(0)}, shapes)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    train(model, optimizer, 2)
    held = [value for entry in optimizer.state.values() for value in entry.values()]
    train(model, optimizer, 2)
    now = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(a is b for a, b in zip(held, now, strict=True))


def test_a_parameter_that_is_unfrozen_later_gets_a_state():
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = FishSparseAdamW(model.named_parameters())
    train(model, optimizer, 3)
    assert model[0].bias not in optimizer.state
    model[0].bias.requires_grad_(True)
    optimizer.step()  # its gradient comes later
    assert optimizer.state[model[0].bias]["step"] == 0


def test_what_belongs_to_no_parameter_is_left_as_it_is():
    model = make_model()
    mask = full_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    optimizer.state["accumulated"] = 3
    train(model, optimizer, 2)
    assert optimizer.state_dict()["state"]["accumulated"] == 3
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.set_mask(make_mask(model))
    train(model, optimizer, 1)
    assert optimizer.state["accumulated"] == 3


def test_functions_are_mapped_over_states_as_over_dicts():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=full_mask(model))
    train(model, optimizer, 1)
    doubled = tree_map(lambda value: 2 * value, optimizer.state)
    assert type(doubled) is States
    for param, entry in doubled.items():
        assert type(entry) is Entry
        assert torch.equal(entry["exp_avg"], 2 * optimizer.state[param]["exp_avg"])
    paths = [path for path, _ in tree_flatten_with_path(first(optimizer))[0]]
    assert [path[0].key for path in paths] == list(KEYS)
    file = io.BytesIO()
    torch.save(first(optimizer), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["step"] == 1


def test_a_checkpoint_has_plain_dicts():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=full_mask(model))
    train(model, optimizer, 1)
    assert {type(entry) for entry in optimizer.state_dict()["state"].values()} == {dict}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert {type(entry) for entry in optimizer.state.values()} == {Entry}
    for other in (copy.deepcopy(optimizer), copy.copy(optimizer)):
        assert type(other.state) is States
        assert {type(entry) for entry in other.state.values()} == {Entry}
