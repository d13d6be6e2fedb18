"""Two processes: DDP reduces the leaves alone; drifting ranks and shards are refused."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fishkern
from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.processes import two_processes
from tests.support.tolerances import MODEL

LR = 1e-2


def run_calls(rank, path, calls):
    for function, *args in calls:
        function(rank, *args)


def random_mask(model, density=0.2):
    """As in the other tests, which load more than a new process needs."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    chosen = {n: torch.rand(s.numel(), generator=generator) < density for n, s in shapes.items()}
    return SparseMask({name: c.nonzero().view(-1) for name, c in chosen.items()}, shapes)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def loss_of(model, step, ranks):
    """The mean over the shares of some ranks of one batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 8, 6, generator=generator)[ranks].flatten(0, 1)
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def train(model, optimizer, ranks, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step, ranks).backward()
        optimizer.step()


def same_on_all_ranks(tensors):
    for tensor in tensors:
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.detach().contiguous())
        assert torch.equal(*both)


def _replicated(rank, make):
    model = mlp()
    mask = random_mask(model)
    alone = copy.deepcopy(model)
    train_only(alone, mask)
    train(alone, make(attached(alone).parameters(), lr=LR), [0, 1])
    handle = train_only(model, mask)
    wrapped = DistributedDataParallel(model)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    wrapped.register_comm_hook(None, hook)
    train(wrapped, make(wrapped.parameters(), lr=LR), [rank])
    assert sum(reduced) == 3 * mask.num_selected
    same_on_all_ranks(handle.parameters())
    same_on_all_ranks(model.state_dict().values())
    assert distance(weights(model), weights(alone)) < MODEL / 10
    assert distance(weights(model), weights(mlp())) > 1e-3


def _accumulated(rank):
    model = mlp()
    mask = random_mask(model)
    handle = train_only(model, mask)
    wrapped = DistributedDataParallel(model)
    optimizer = FishSparseAdamW(wrapped.named_parameters(), lr=LR, mask=mask)
    for step in range(2):
        optimizer.zero_grad()
        with wrapped.no_sync():
            loss_of(wrapped, 2 * step, [rank]).backward()
        loss_of(wrapped, 2 * step + 1, [rank]).backward()
        optimizer.step()
    same_on_all_ranks(handle.parameters())


def test_ddp_reduces_exactly_the_leaves(tmp_path):
    ways = [(_replicated, make) for make in (torch.optim.AdamW, FishSparseAdamW)]
    two_processes(run_calls, tmp_path, [*ways, (_accumulated,)])


def _drifting(rank, make):
    model = mlp()
    handle = train_only(model, random_mask(model))
    optimizer = make(handle.parameters(), lr=LR)
    for leaf in handle.parameters():  # as checkpoint libraries make states: nothing to compare yet
        leaf.grad = torch.zeros_like(leaf)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    loss_of(model, 0, [rank]).backward()  # the wrapper was forgotten
    with pytest.raises(RuntimeError, match=r"on rank 1 are not those on rank 0.*Distributed"):
        optimizer.step()
    assert distance(weights(model), before) == 0
    for leaf in handle.parameters():
        dist.all_reduce(leaf.grad)
    optimizer.step()
    loss_of(model, 1, [rank]).backward()
    optimizer.step()  # the first one only is compared
    assert distance(weights(model), before) > 0


def _stages(rank):
    """Ranks that train different models have nothing to compare."""
    model = mlp() if rank else nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    handle = train_only(model, random_mask(model))
    train(model, torch.optim.SGD(handle.parameters(), lr=LR), [rank])


def test_ranks_with_other_gradients_are_refused_in_the_first_step(tmp_path):
    ways = [(_drifting, make) for make in (torch.optim.SGD, FishSparseAdamW)]
    two_processes(run_calls, tmp_path, [*ways, (_stages,)])


def _sharded(rank, make, parts):
    """As long as weights cannot follow sharded leaves."""
    mesh = dist.init_device_mesh("cpu", (2,))
    model = mlp()
    handle = train_only(model, random_mask(model, density=0.5))
    for part in parts:
        fully_shard(model[part], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="weights do not follow sharded leaves"):
        train(model, make(handle.parameters(), lr=LR), [rank])


def _refused(rank):
    mesh = dist.init_device_mesh("cpu", (2,))
    model = mlp()
    mask = random_mask(model)
    with pytest.raises(ValueError, match=r"wrapped by DistributedDataParallel.*model inside first"):
        train_only(DistributedDataParallel(model), mask)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded.*train with DDP"):
        train_only(model, mask)
    assert fishkern.attached(model) is None


def test_wrapped_and_sharded_models_are_refused(tmp_path):
    calls = [
        (_sharded, make, parts)
        for make in (torch.optim.AdamW, FishSparseAdamW)
        for parts in ([], [0])
    ]
    two_processes(run_calls, tmp_path, [(_refused,), *calls])
