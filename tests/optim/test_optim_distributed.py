"""torch.distributed.checkpoint in all its forms, and FSDP2, with one and two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fishkern
from fishkern.optim import FishSparseAdamW
from tests.support.optim import copies, full_mask, make_mask, make_model, train
from tests.support.processes import two_processes
from tests.support.tolerances import assert_matches

# One process is meant where it says so; TypedStorage is torch's own, in its reader.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
WAYS = ("dense", "leaves", "no_mask")
LR = 1e-2
# With both options torch cannot read what it writes, of its own AdamW either.
OPTIONS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}


def build(way, seed=0, dtype=torch.float32, mask=None):
    torch.manual_seed(seed)
    model = make_model(dtype)
    mask = make_mask(model) if mask is None else mask
    if way == "leaves":
        fishkern.train_only(model, mask)
    mask = None if way == "no_mask" else mask
    groups = [list(model.named_parameters())[i::2] for i in range(2)]
    groups = [{"params": group, "lr": LR / (i + 1)} for i, group in enumerate(groups)]
    return model, FishSparseAdamW(groups, mask=mask)


def assert_equal(model, other):
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def assert_same_state(optimizer, other):
    """Of all that is trainable: torch leaves out frozen parameters, here those without entries."""
    held = [
        [each.state[p] for group in each.param_groups for p in group["params"] if p.requires_grad]
        for each in (optimizer, other)
    ]
    for entry, loaded in zip(*held, strict=True):
        assert entry.keys() == loaded.keys()
        for key in entry:
            assert loaded[key].dtype == torch.float32
            assert torch.equal(entry[key], loaded[key])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_by_name_are_set_again(way, options):
    options = StateDictOptions(**options)
    model, optimizer = build(way)
    train(model, optimizer, 3)
    found = get_state_dict(model, optimizer, options=options)
    other, fresh = build(way, seed=1)
    set_state_dict(
        other, fresh, model_state_dict=found[0], optim_state_dict=found[1], options=options
    )
    assert_same_state(optimizer, fresh)
    assert fresh.mask == optimizer.mask
    train(model, optimizer, 3, start=3)
    train(other, fresh, 3, start=3)
    assert_equal(model, other)


def save_and_load(way, options, path, dtype=torch.float32):
    """Save a run, load it into another model and optimizer, go on with both."""
    options = StateDictOptions(**options)
    model, optimizer = build(way, dtype=dtype)
    train(model, optimizer, 3)
    names = ("model", "optimizer")
    dcp.save(
        dict(zip(names, get_state_dict(model, optimizer, options=options), strict=True)),
        checkpoint_id=path,
    )
    other, fresh = build(way, seed=1, dtype=dtype)
    target = dict(zip(names, get_state_dict(other, fresh, options=options), strict=True))
    dcp.load(target, checkpoint_id=path)
    set_state_dict(
        other,
        fresh,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
        options=options,
    )
    assert_same_state(optimizer, fresh)
    train(model, optimizer, 3, start=3)
    train(other, fresh, 3, start=3)
    assert_equal(model, other)


@pytest.mark.parametrize("options", ["plain", "flattened"])
@pytest.mark.parametrize("way", WAYS)
def test_a_distributed_checkpoint_is_read_again(way, options, tmp_path):
    save_and_load(way, OPTIONS[options], tmp_path)


def test_a_checkpoint_of_another_mask_is_refused_when_flattened_too():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = build("dense")
    train(model, optimizer, 2)
    found = get_state_dict(model, optimizer, options=options)
    other, fresh = build("dense", mask=full_mask(model))
    with pytest.raises(ValueError, match="was trained with another mask"):
        set_state_dict(
            other, fresh, model_state_dict=found[0], optim_state_dict=found[1], options=options
        )


def test_states_made_for_loading_are_not_steps():
    """get_optimizer_state_dict steps with zero gradients and lr = 0; a run may still start anew."""
    for way in WAYS:
        model, optimizer = build(way)
        other, untouched = build(way)
        found = get_optimizer_state_dict(model, optimizer)
        assert all(
            name in found["state"] for name, p in model.named_parameters() if p.requires_grad
        )
        assert all(entry["step"] == 0 for entry in found["state"].values())
        train(model, optimizer, 3)
        train(other, untouched, 3)
        assert_equal(model, other)


# Two processes


def _replicated(rank, path):
    for way in WAYS:
        for name in ("plain", "flattened"):
            where = path / f"{way}-{name}"
            dtype = torch.float32 if way == "leaves" else torch.bfloat16
            save_and_load(way, OPTIONS[name], where, dtype)
            dist.barrier()


def test_two_processes_save_replicated_states_once(tmp_path):
    two_processes(_replicated, tmp_path)
    stored = dcp.FileSystemReader(tmp_path / "dense-plain").read_metadata().storage_data
    names = [index.fqn for index in stored]
    assert len(names) == len(set(names))
    moments = [name for name in names if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 2 * 6
    assert len({entry.relative_path for entry in stored.values()}) == 2  # shared out
    files = (tmp_path / "dense-plain").glob("*.distcp")
    assert sum(f.stat().st_size for f in files) == sum(e.length for e in stored.values())


def _sharded(rank, path):
    mesh = dist.init_device_mesh("cpu", (2,))
    models = [build("no_mask", dtype=torch.float32)[0] for _ in range(3)]
    plain = models.pop()
    for model in models:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = [FishSparseAdamW(model.named_parameters(), lr=LR) for model in (*models, plain)]
    train(plain, optimizers[2], 6)

    model, other = models
    train(model, optimizers[0], 3)
    for param in model.parameters():
        assert type(optimizers[0].state[param]["exp_avg"]) is type(param.data)  # a shard, too
    found = get_state_dict(model, optimizers[0])
    dcp.save(dict(zip("ab", found, strict=True)), checkpoint_id=path / "sharded")
    target = dict(zip("ab", get_state_dict(other, optimizers[1]), strict=True))
    dcp.load(target, checkpoint_id=path / "sharded")
    set_state_dict(other, optimizers[1], model_state_dict=target["a"], optim_state_dict=target["b"])
    train(other, optimizers[1], 3, start=3)
    for a, b in zip(other.parameters(), plain.parameters(), strict=True):
        assert_matches(a.full_tensor(), b.detach().double(), terms=16)
    if rank == 0:
        assert models[0][3].bias.to_local().numel() == 2  # of 3: uneven shards
    for options in ({"state_dtype": torch.uint8}, {"check_numerics": True}):
        refusing = FishSparseAdamW(model.named_parameters(), **options)
        before = copies(model)
        with pytest.raises(ValueError, match="sharded"):
            refusing.step()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_sharded_parameters_are_trained_and_saved_whole(tmp_path):
    two_processes(_sharded, tmp_path)


def _swapped(rank, path):
    """The optimizer exists before the parameters are sharded, and is given them afterwards."""
    mesh = dist.init_device_mesh("cpu", (2,))
    model, optimizer = build("no_mask")
    other, untouched = copy.deepcopy((model, optimizer))
    names = [name for name, _ in model.named_parameters()]
    held = [group["param_names"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # placeholders first, so that memory can be freed
        group["params"] = [torch.empty(1) for _ in group["params"]]
    fully_shard(model, mesh=mesh)
    sharded = dict(zip(names, model.parameters(), strict=True))
    for group, own in zip(optimizer.param_groups, held, strict=True):
        group["params"] = [sharded[name] for name in own]
    train(model, optimizer, 4)
    train(other, untouched, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_matches(a.full_tensor(), b.detach().double(), terms=16)


def test_parameters_sharded_under_the_optimizer_are_trained(tmp_path):
    two_processes(_swapped, tmp_path)
