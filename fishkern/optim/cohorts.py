"""Entries of one parameter with other step counts than its others, since its mask has changed.

Entries with equal counts are a cohort. Where there are several, ``step`` is ``[c]``, one count for
each, and ``cohorts`` ``[k]`` says which one an entry belongs to; moments stay in the mask's order.
The op takes one list entry per cohort: all entries of a batch are sorted by cohort for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fishkern.training.remasking import common

COHORTS = "cohorts"


class Sorting:
    """Where the entries of a batch lie when each cohort's stand together.

    Args:
        positions: For each parameter the flat positions of its entries, ``[k_i]``.
        cohorts: For each the cohort of every entry, ``[k_i]``.

    Attributes:
        owners: For each cohort the number of its parameter in the batch.
        sizes: For each how many entries it has.
        order: For each entry, cohort by cohort, its place in the packed state.
        indices: For each entry, cohort by cohort, its position in its parameter.
    """

    def __init__(self, positions: Sequence[Tensor], cohorts: Sequence[Tensor]) -> None:
        self.owners: list[int] = []
        self.sizes: list[int] = []
        orders, begin = [], 0
        for i, cohort in enumerate(cohorts):
            orders.append(torch.argsort(cohort, stable=True) + begin)
            sizes = torch.bincount(cohort).tolist()
            self.owners += [i] * len(sizes)
            self.sizes += sizes
            begin += len(cohort)
        self.order = torch.cat(orders)
        self.indices = torch.cat(list(positions))[self.order]
        self.offsets = _offsets(self.sizes)

    def only(self, chosen: Sequence[int]) -> Sorting:
        """The same of some of the cohorts."""
        part = object.__new__(Sorting)
        part.owners = [self.owners[j] for j in chosen]
        part.sizes = [self.sizes[j] for j in chosen]
        orders, indices = self.order.split(self.sizes), self.indices.split(self.sizes)
        part.order = torch.cat([orders[j] for j in chosen])
        part.indices = torch.cat([indices[j] for j in chosen])
        part.offsets = _offsets(part.sizes)
        return part


def _offsets(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64, device="cpu")


def transfer(entry: dict[str, Any], old: Tensor, new: Tensor) -> dict[str, Any]:
    """A parameter's state for other entries: what stays keeps its moments and its step count.

    Args:
        entry: The state, of one cohort or several.
        old: Its flat positions ``[k]``, ascending.
        new: The positions to have from now on.

    Returns:
        A state of its own for ``new``, whose moments are ``[len(new)]``.
    """
    stays, source = common(new, old)
    moved: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("step", COHORTS):
            continue
        if isinstance(value, Tensor) and value.numel() == len(old):
            moved[key] = value.new_zeros(len(new))
            moved[key][stays] = value.reshape(-1)[source]
        else:
            moved[key] = value
    step = entry["step"]
    counts = torch.zeros(len(new), dtype=step.dtype, device=new.device)
    of_entries = step.to(new.device)
    if COHORTS in entry:
        of_entries = of_entries[entry[COHORTS].to(new.device).long()][source]
    counts[stays] = of_entries
    steps, cohorts = counts.unique(return_inverse=True)
    if len(steps) > 1:
        kind = torch.int16 if len(steps) < 2**15 else torch.int32
        return {"step": steps.to(step.device), **moved, COHORTS: cohorts.to(kind)}
    one = steps[0] if len(steps) else torch.zeros((), dtype=step.dtype, device=step.device)
    return {"step": one.to(step.device, copy=True), **moved}
