"""What frameworks do to optimizers: Accelerate, distributed checkpoints, exchanged tensors."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from fishkern.optim import FishSparseAdamW
from tests.support.optim import copies, loss_of, make_mask, make_model, train


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def twins(dtype=torch.float32, **options):
    """Two equal models with an optimizer each."""
    models = [make_model(dtype)]
    models.append(copy.deepcopy(models[0]))
    mask = make_mask(models[0])
    return [
        (model, FishSparseAdamW(model.named_parameters(), lr=1e-2, mask=mask, **options))
        for model in models
    ]


def assert_equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_its_own_state_before_the_first_step_is_harmless():
    (model, optimizer), (other, untouched) = twins(torch.bfloat16)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    train(model, optimizer, 3)
    train(other, untouched, 3)
    assert_equal(model, other)


def test_accelerate_prepares_steps_and_resumes():
    accelerate = pytest.importorskip("accelerate")
    (model, optimizer), (other, plain) = twins(torch.bfloat16)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    for i in range(3):
        prepared.zero_grad()
        accelerator.backward(loss_of(model, i))
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        prepared.step()
    train(other, plain, 3)
    assert_equal(model, other)
    prepared.load_state_dict(prepared.state_dict())
    assert all(entry["exp_avg"].dtype == torch.float32 for entry in optimizer.state.values())
    train(model, prepared, 3, start=3)
    train(other, plain, 3, start=3)
    assert_equal(model, other)


def test_exchanged_parameters_keep_names_mask_and_moments():
    (model, optimizer), (other, untouched) = twins()
    for start in (0, 3):  # before the first step, and in training
        for child in model.modules():
            for name, param in list(child.named_parameters(recurse=False)):
                setattr(child, name, torch.nn.Parameter(param.detach().clone()))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        train(model, optimizer, 3, start=start)
        train(other, untouched, 3, start=start)
        assert_equal(model, other)
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("how", ["in_place", "entries", "whole", "data"])
def test_exchanged_state_tensors_are_the_ones_that_are_used(how):
    (model, optimizer), (other, untouched) = twins()
    train(model, optimizer, 2)
    train(other, untouched, 2)
    # twice what they were, so that going on with the old ones would be seen
    for entry in untouched.state.values():
        entry["exp_avg"].mul_(2)
    moved = {
        p: {k: v.clone() * (1 + (k == "exp_avg")) for k, v in e.items()}
        for p, e in optimizer.state.items()
    }
    if how == "in_place":
        for param, entry in optimizer.state.items():
            for key in entry:
                entry[key] = moved[param][key]
    elif how == "data":
        for param, entry in optimizer.state.items():
            for key in entry:
                entry[key].data = moved[param][key]
    elif how == "entries":
        for param in moved:
            optimizer.state[param] = moved[param]
    else:
        optimizer.state = moved
    train(model, optimizer, 3, start=2)
    train(other, untouched, 3, start=2)
    assert_equal(model, other)
    for param in moved:
        assert optimizer.state[param]["step"] == 5
        assert optimizer.state_dict()["state"][0]["step"] == 5


def test_a_removed_group_and_changed_options_take_effect():
    (model, optimizer), _ = twins()
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copies(model)
    train(model, optimizer, 1)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_that_only_builds_states_is_not_counted(sharded, mesh):
    model = make_model()
    other = copy.deepcopy(model)
    if sharded:
        fully_shard(model, mesh=mesh)
    optimizer, untouched = (FishSparseAdamW(m.named_parameters(), lr=1e-2) for m in (model, other))
    checkpoint = get_optimizer_state_dict(model, optimizer)
    assert all(entry["step"] == 0 for entry in checkpoint["state"].values())
    train(model, optimizer, 3)
    train(other, untouched, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.full_tensor() if sharded else a, b)


def test_a_first_step_at_lr_zero_is_counted():
    (model, optimizer), _ = twins()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(entry["step"] == 1 for entry in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant here
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch, in its own reader
def test_distributed_checkpoint_round_trip(tmp_path):
    (model, optimizer), (other, fresh) = twins(torch.bfloat16)
    train(model, optimizer, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)

    other.load_state_dict(model.state_dict())
    before = copies(other)
    target = get_optimizer_state_dict(other, fresh)  # a step with zero gradients and lr = 0
    assert len(target["state"]) == 6
    for name, param in other.named_parameters():
        assert torch.equal(param, before[name])
    dcp.load({"optimizer": target}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, target)
    for entry, loaded in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        for key in entry:
            assert loaded[key].dtype == torch.float32
            assert torch.equal(entry[key], loaded[key])
    train(model, optimizer, 3, start=3)
    train(other, fresh, 3, start=3)
    assert_equal(model, other)


def test_ddps_and_compiles_names_load_into_the_bare_model():
    (model, optimizer), (other, fresh) = twins()
    wrapped = FishSparseAdamW(
        [(f"module.{name}", param) for name, param in model.named_parameters()],
        lr=1e-2,
        mask=optimizer.mask,
    )
    train(model, wrapped, 2)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(wrapped.state_dict())
    train(model, wrapped, 2, start=2)
    train(other, fresh, 2, start=2)
    assert_equal(model, other)


def test_sharded_parameters_are_trained_whole(mesh):
    model = make_model()
    other = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    optimizer = FishSparseAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    checkpoint = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, optimizer, checkpoint)
    train(model, optimizer, 3, start=3)
    train(other, FishSparseAdamW(other.parameters(), lr=1e-2), 6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b)
        assert type(optimizer.state[a]["exp_avg"]) is type(a.data)


def test_a_mask_on_sharded_parameters_is_refused(mesh):
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask)
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as Accelerate does
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"0\.weight is sharded.*train with Distributed"):
        optimizer.step()
