"""Entries of one parameter with other step counts than its others, since its mask has changed.

Entries with equal counts are a cohort. Where there are several, ``step`` is ``[c]``, one count for
each, and ``cohorts`` ``[k]`` says which one an entry belongs to; moments stay in the mask's order.
The op takes one list entry per cohort: all entries of a batch are sorted by cohort for it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        indices: For each cohort the positions of its entries in the parameter.
    """

    def __init__(self, positions: Sequence[Tensor], cohorts: Sequence[Tensor]) -> None:
        self._lengths = [len(index) for index in positions]
        orders, self.owners, self._sizes = [], [], []
        begin = 0
        for i, cohort in enumerate(cohorts):
            orders.append(torch.argsort(cohort, stable=True) + begin)
            sizes = torch.bincount(cohort).tolist()
            self.owners += [i] * len(sizes)
            self._sizes += sizes
            begin += len(cohort)
        self._order = torch.cat(orders)
        self.indices = self.sort(torch.cat(list(positions)))

    def sort(self, tensor: Tensor) -> list[Tensor]:
        """Each cohort's part of a tensor with one value for each entry of the batch."""
        return list(tensor.view(-1)[self._order].split(self._sizes))

    def restore(self, tensor: Tensor, parts: Sequence[Tensor]) -> None:
        """Write back what ``sort`` gave."""
        tensor.view(-1)[self._order] = torch.cat(list(parts))

    def by_param(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What ``sort`` gave, each parameter's part."""
        tensor = torch.empty_like(self._order, dtype=parts[0].dtype)
        self.restore(tensor, parts)
        return list(tensor.split(self._lengths))


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
