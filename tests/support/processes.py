"""Two processes that talk by gloo, for what is said of ranks."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def two_processes(function, path, *args):
    """Call ``function(rank, path, *args)`` in each of two new processes, in a group of both."""
    mp.spawn(_process, (function, path, *args), nprocs=2)


@contextlib.contextmanager
def process_group(rank, world_size, path):
    store = f"file://{path}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _process(rank, function, path, *args):
    torch.set_num_threads(1)
    with process_group(rank, 2, path):
        function(rank, path, *args)
        dist.barrier()  # gloo aborts a process whose peer ends while they still talk
    end_process()


def end_process():
    """End without taking the interpreter apart.

    A mesh keeps its groups, and so gloo's threads, past ``destroy_process_group``, and autograd's
    threads have no end at all. Such a thread aborts the process if it asks for the interpreter
    while that is taken apart, now and then ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
