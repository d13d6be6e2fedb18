"""What a step must not do: half its work, hide what it wrote, hold or trust more than it has to."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fishkern
from fishkern.optim import FishSparseAdamW
from fishkern.selection.masks import SparseMask
from tests.support.optim import (
    bits,
    copies,
    kernel,  # noqa: F401
    loss_of,
    make_mask,
    make_model,
    train,
)

pytestmark = pytest.mark.usefixtures("kernel")


def two_groups(model, mask, **options):
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    return FishSparseAdamW(groups, mask=mask, **options)


def refused_whole(model, optimizer, match):
    """A step that raises changes neither a parameter nor a state."""
    optimizer.zero_grad()
    loss_of(model, 9).backward()
    params, states = copies(model), copy.deepcopy(list(optimizer.state.values()))
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(bits(param), bits(params[name])), name
    for entry, before in zip(optimizer.state.values(), states, strict=True):
        assert entry.keys() == before.keys()
        assert all(torch.equal(entry[key], before[key]) for key in entry)


@pytest.mark.parametrize("masked", [True, False])
def test_amsgrad_switched_on_is_refused_whole(masked):
    model = make_model()
    optimizer = two_groups(model, make_mask(model) if masked else None)
    train(model, optimizer, 2)
    optimizer.param_groups[1]["amsgrad"] = True
    refused_whole(model, optimizer, "max_exp_avg_sq.*amsgrad")


def test_state_that_lacks_a_moment_is_refused_whole():
    model = make_model()
    optimizer = two_groups(model, make_mask(model))
    train(model, optimizer, 2)
    del optimizer.state[model[3].bias]["exp_avg_sq"]
    refused_whole(model, optimizer, "no 'exp_avg_sq'")


@pytest.mark.parametrize("way", ["mask", "dense", "some", "leaves"])
def test_backward_through_weights_that_a_step_changed_raises(way):
    model = make_model()
    mask = None if way == "dense" else make_mask(model)
    if way == "leaves":
        fishkern.train_only(model, mask)
    optimizer = FishSparseAdamW(model.named_parameters(), lr=0.1, mask=mask)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    if way == "some":
        model[0].bias.grad = None
    versions, without_grad = model[3].weight._version, model[0].bias._version
    optimizer.step()
    assert model[3].weight._version > versions
    if way == "some":
        assert model[0].bias._version == without_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_of_another_mask_are_refused():
    model = make_model()
    mask = make_mask(model)
    moved = {**mask, "0.weight": mask["0.weight"].clone()}
    free = sorted(set(range(48)) - set(mask["0.weight"].tolist()))[0]
    moved["0.weight"][0] = free
    moved["0.weight"] = moved["0.weight"].sort().values
    other = SparseMask(moved, mask.shapes)
    with fishkern.train_only(model, mask):
        with pytest.raises(ValueError, match=r"holds other entries of '0\.weight'"):
            FishSparseAdamW(model.named_parameters(), mask=other)
        FishSparseAdamW(model.named_parameters(), mask=mask)


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


@pytest.mark.parametrize("groups", [1, 2])
def test_indices_are_held_once(groups):
    model = make_model()
    mask = make_mask(model)
    before = {name: (index, index.data_ptr(), index.clone()) for name, index in mask.items()}
    if groups == 1:
        optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    else:
        optimizer = two_groups(model, mask)
    train(model, optimizer, 2)
    packed = [batch.layout[1] for plan in optimizer._plans.values() for batch in plan.batches]
    sparse = [n for n in mask if len(mask[n]) < mask.shapes[n].numel()]
    assert len(packed) == groups
    assert storages(optimizer.mask[n] for n in sparse) == storages(packed)
    assert optimizer.mask == mask
    for name, (index, address, values) in before.items():  # the user's own is as it was
        assert mask[name] is index
        assert index.data_ptr() == address
        assert torch.equal(index, values)


def test_pickles_hold_everything_once():
    """A view pickles its whole storage: 50 of them would make the file 50 times as large."""
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(50)])
    shapes = {name: param.shape for name, param in model.named_parameters()}
    mask = SparseMask({name: torch.arange(0, 100, 2) for name in shapes}, shapes)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    fresh = len(pickle.dumps(optimizer))
    model(torch.randn(3, 10)).sum().backward()
    optimizer.step()
    grown = len(pickle.dumps(optimizer)) - fresh
    assert grown < 50 * (3 * 50 * 4 + 2000)
    loaded = pickle.loads(pickle.dumps(optimizer))
    for a, b in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert loaded.mask == mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", ["optimizer", "leaves"])
def test_default_device(way, masked):
    """Tensors that steps make for themselves are where they belong, whatever the default is."""
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = make_mask(models[0])
    for device, model in zip(["cpu", "meta"], models, strict=True):
        if way == "leaves":
            fishkern.train_only(model, mask)
        named = mask if masked or way == "leaves" else None
        optimizer = FishSparseAdamW(model.named_parameters(), mask=named)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            with torch.device(device):
                optimizer.step()
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


def test_a_first_step_that_moves_nothing_is_not_counted():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), lr=0.0, mask=make_mask(model))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {0.0}
