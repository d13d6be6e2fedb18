"""Leaves in a checkpoint: the float32 values of weights that hold only their roundings.

A bfloat16 weight is saved with the model, rounded. What it was rounded from is the leaf of
``train_only``; the optimizer's checkpoint carries it, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fishkern.optim.states import Groups
from fishkern.training import leaves

MASTER = "master"


def add_masters(state_dict: dict[str, Any], groups: Groups) -> None:
    """Add ``master``, ``[k]`` float32, to each state whose parameter is a narrower weight's leaf.

    Args:
        state_dict: A checkpoint with the groups' states.
        groups: The optimizer's own, of which torch made it.
    """
    state = state_dict["state"]
    for key, param in _places(state_dict["param_groups"], groups):
        if state.get(key) and leaves.is_master(param):
            state[key] = {**state[key], MASTER: param.detach()}


def saved_masters(state_dict: dict[str, Any], groups: Groups) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a parameter and the values that a checkpoint has for it.

    Raises:
        ValueError: There are other numbers of them than of the parameter's.
    """
    found = []
    for key, param in _places(state_dict["param_groups"], groups):
        master = state_dict["state"].get(key, {}).get(MASTER)
        if master is None:
            continue
        if master.shape != param.shape:
            raise ValueError(
                f"a master of the checkpoint has shape {list(master.shape)}, but its leaf has "
                f"{list(param.shape)}: load a checkpoint of the same mask"
            )
        found.append((param, master))
    return found


@torch.no_grad()
def restore_masters(masters: list[tuple[Tensor, Tensor]]) -> None:
    """Put the values into the leaves, and their roundings into the weights."""
    for leaf, values in masters:
        leaf.copy_(values)
        leaves.sync(leaf)


def _places(saved: Groups, own: Groups) -> Iterator[tuple[Any, Tensor]]:
    """Keys in a checkpoint and the parameters that they stand for."""
    for theirs, ours in zip(saved, own, strict=True):
        yield from zip(theirs["params"], ours["params"], strict=True)
