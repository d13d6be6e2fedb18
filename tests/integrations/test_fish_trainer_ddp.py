"""FishTrainer on two ranks: one mask, and equal weights, whichever samples each rank scored."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fishkern
from fishkern import SparseMask
from fishkern.integrations.transformers import MASK_NAME, FishTrainer
from tests.support.loops import HEAD, arguments, assert_same_weights, dataset, make_model, weights
from tests.support.processes import end_process

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def rank_main(rank, port, folder, train_only):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    torch.set_num_threads(1)
    subject = FishTrainer(
        make_model("base"),
        arguments(folder / "run", ddp_backend="gloo", max_steps=3),
        train_dataset=dataset(),
        density=0.05,
        num_samples=8,
        keep=HEAD,
        warmup_steps=2,
        train_only=train_only,
    )
    subject.train()
    reduced = subject.model_wrapped.parameters()
    torch.save(
        {
            "weights": weights(subject.model),
            "scores": dict(subject.fisher),
            "reduced": sum(p.numel() for p in reduced if p.requires_grad),
        },
        folder / f"{rank}.pt",
    )
    subject.mask.save(folder / f"{rank}-{MASK_NAME}")
    dist.destroy_process_group()
    end_process()


@pytest.mark.parametrize("train_only", [False, True])
def test_ranks_train_the_same_entries_to_the_same_weights(train_only, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (port, tmp_path, train_only), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    masks = [SparseMask.load(tmp_path / f"{rank}-{MASK_NAME}") for rank in range(2)]
    assert masks[0] == masks[1]
    assert masks[0] == fishkern.select(one["scores"], density=0.05, keep=HEAD)
    assert any(not torch.equal(one["scores"][n], s) for n, s in other["scores"].items())
    assert_same_weights(one["weights"], other["weights"])
    total = sum(p.numel() for p in make_model("base").parameters())
    assert one["reduced"] == (masks[0].num_selected if train_only else total)
