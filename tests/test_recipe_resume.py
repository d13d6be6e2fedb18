"""An optimizer of ``create_fish_optimizer`` goes on with its checkpoint's mask, not its own."""

import copy
import pickle

import pytest
import torch

import fishkern
from tests.test_recipe import Net, batches, create, loss_fn


def train(model, optimizer, data):
    model.eval()  # no running statistics
    for batch in data:
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_only", [False, True])
def test_resumed_is_unbroken(train_only, dtype):
    data = [(x.to(dtype), y) for x, y in batches()]
    model = Net()
    optimizer = create(model, train_only=train_only, lr=1e-2)
    model.to(dtype)
    train(model, optimizer, data[:2])
    checkpoint = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, data[2:])

    torch.manual_seed(7)
    other = Net()
    fresh = create(other, train_only=train_only, lr=1e-2)
    other.to(dtype)
    assert fresh.mask != optimizer.mask
    other.load_state_dict(checkpoint[0])
    fresh.load_state_dict(checkpoint[1])
    assert fresh.mask == optimizer.mask
    train(other, fresh, data[2:])
    for (name, value), truth in zip(
        other.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, truth), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_only", [False, True])
def test_a_refused_checkpoint_changes_nothing(train_only, dtype):
    data = [(x.to(dtype), y) for x, y in batches()]
    other = create(Net(), train_only=train_only, state_dtype=torch.uint8)
    other.step()  # makes its moments
    torch.manual_seed(7)
    model = Net()
    optimizer = create(model, train_only=train_only, lr=1e-2)
    model.to(dtype)
    train(model, optimizer, data[:2])
    twin, same = copy.deepcopy((model, optimizer))
    assert other.mask != optimizer.mask
    for _ in range(2):
        with pytest.raises(ValueError, match="build it with state_dtype=torch"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.mask == same.mask
        if train_only:
            assert fishkern.attached(model).mask == same.mask
    train(model, optimizer, data[2:])
    train(twin, same, data[2:])
    for value, truth in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, truth)


def test_leaves_that_ddp_holds_are_not_exchanged(monkeypatch):
    optimizer = create(Net(), train_only=True)
    torch.manual_seed(7)
    model = Net()
    fresh = create(model, train_only=True)
    mask = fresh.mask
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"another than the one computed now.*FishTrainer"):
        fresh.load_state_dict(optimizer.state_dict())
    assert fresh.mask is mask
    assert fishkern.attached(model).mask == mask
    fresh.load_state_dict(fresh.state_dict())  # its own


@pytest.mark.parametrize("train_only", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_scores(train_only, duplicate):
    model, data = Net(), batches()
    optimizer = create(model, train_only=train_only)
    train(model, optimizer, data[:1])
    twin, same = duplicate((model, optimizer))
    assert same.fisher == optimizer.fisher
    assert same.mask == optimizer.mask
    train(model, optimizer, data[1:])
    train(twin, same, data[1:])
    for value, truth in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, truth)


def test_a_copy_refuses_another_mask_in_train_only():
    """It does not know whose leaves it trains."""
    other = create(Net(), train_only=True)
    torch.manual_seed(7)
    model = Net()
    twin, same = copy.deepcopy((model, create(model, train_only=True)))
    assert other.mask != same.mask
    mask, before = same.mask, copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match="mask"):
        same.load_state_dict(other.state_dict())
    assert same.mask is mask
    assert not same.state
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
