"""Checkpoints elsewhere: in safetensors files, on another device, of a changed mask by name."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from fishkern.optim import FishSparseAdamW
from fishkern.selection.masks import SparseMask
from tests.support.optim import make_mask, make_model, train


def twins(**options):
    """A model that was trained for a while, and another one to load it into."""
    pairs = []
    for model in (make_model(), make_model()):
        mask = pairs[0][1].mask if pairs else make_mask(model)
        optimizer = FishSparseAdamW(model.named_parameters(), lr=1e-2, mask=mask, **options)
        pairs.append((model, optimizer))
    train(*pairs[0], 3)
    return pairs


def assert_goes_on_alike(one, other):
    for pair in (one, other):
        train(*pair, 3, start=3)
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"state_dtype": torch.bfloat16}])
def test_safetensors_hold_the_state(options, tmp_path):
    """Tensors by number and name, options as JSON; the mask has a file of its own kind."""
    (model, optimizer), (other, _) = twins(**options)
    saved = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "mask"} for g in saved["param_groups"]]
    tensors = {f"{i}.{k}": t for i, entry in saved["state"].items() for k, t in entry.items()}
    save_file(tensors, tmp_path / "state.safetensors", {"groups": json.dumps(groups)})
    optimizer.mask.save(tmp_path / "mask.safetensors")
    other.load_state_dict(model.state_dict())
    # No view has taken the packed tensor with it.
    bytes_held = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "state.safetensors").stat().st_size < bytes_held + 8000

    mask = SparseMask.load(tmp_path / "mask.safetensors")
    fresh = FishSparseAdamW(other.named_parameters(), mask=mask, **options)
    state = {i: {} for i in range(6)}
    for key, tensor in load_file(tmp_path / "state.safetensors").items():
        i, kind = key.split(".")
        state[int(i)][kind] = tensor
    target = fresh.state_dict()["param_groups"]  # with the mask
    fresh.load_state_dict({"state": state, "param_groups": [target[0] | groups[0]]})
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert_goes_on_alike((model, optimizer), (other, fresh))


@pytest.mark.parametrize("capturable", [False, True])
def test_loaded_states_lie_beside_their_parameters(capturable):
    """Without a second device: on one that holds no numbers, but says where they would be."""
    (_, optimizer), (other, _) = twins(capturable=capturable)
    other = other.to("meta")
    moved = FishSparseAdamW(other.named_parameters(), mask=optimizer.mask, capturable=capturable)
    moved.load_state_dict(optimizer.state_dict())
    for param, entry in moved.state.items():
        devices = {kind: value.device.type for kind, value in entry.items()}
        assert devices.pop("step") == ("meta" if capturable else "cpu")
        assert set(devices.values()) == {param.device.type} == {"meta"}
    assert all(t.device.type == "cpu" for e in optimizer.state.values() for t in e.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant here
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch, in its own reader
@pytest.mark.parametrize("flattened", [False, True])
def test_a_distributed_checkpoint_of_a_changed_mask_is_read_again(flattened, tmp_path):
    """Parameters whose entries have several step counts: ``step`` [c], and ``cohorts``."""
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    pairs = twins()
    for each in pairs:
        train(*each, 1)
        each[1].set_mask(make_mask(each[0], 0.5, seed=1))
        train(*each, 2)
    (model, optimizer), (other, fresh) = pairs
    assert any("cohorts" in entry for entry in optimizer.state.values())
    names = ("model", "optimizer")
    found = get_state_dict(model, optimizer, options=options)
    dcp.save(dict(zip(names, found, strict=True)), checkpoint_id=tmp_path)
    target = dict(zip(names, get_state_dict(other, fresh, options=options), strict=True))
    dcp.load(target, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        fresh,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
        options=options,
    )
    for entry, loaded in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert entry.keys() == loaded.keys()
        for key, value in entry.items():
            assert torch.equal(value, loaded[key]), key
    assert_goes_on_alike((model, optimizer), (other, fresh))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_several_step_counts_are_not_read_into_one(tmp_path):
    """A new optimizer has no cohorts yet, and torch reads in place: it says so, and stops."""
    (model, optimizer), (other, _) = twins()
    optimizer.set_mask(make_mask(model, 0.5, seed=1))
    train(model, optimizer, 1)
    dcp.save({"optimizer": get_state_dict(model, optimizer)[1]}, checkpoint_id=tmp_path)
    fresh = FishSparseAdamW(other.named_parameters(), mask=optimizer.mask)
    target = {"optimizer": get_state_dict(other, fresh)[1]}
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load(target, checkpoint_id=tmp_path)
    fresh.load_state_dict(optimizer.state_dict())  # which torch.save writes, is the way
    other.load_state_dict(model.state_dict())
    assert_goes_on_alike((model, optimizer), (other, fresh))
