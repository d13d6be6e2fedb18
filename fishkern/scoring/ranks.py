"""Scoring by several processes, each with samples of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fishkern.scoring.rescoring import Sums
from fishkern.selection.masks import SparseMask
from fishkern.selection.ranking import split

__all__ = ["RankSums", "all_of", "first_of", "gathered", "rank_in"]


def rank_in(group: Any) -> int:
    """This process's number in the group; 0 without one."""
    return 0 if group is None else torch.distributed.get_rank(group)


def all_of(value: Any, group: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    if group is None:
        return [value]
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def first_of(value: Any, group: Any) -> Any:
    """The value of the group's first rank, on every rank."""
    return all_of(value, group)[0]


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """One rank's rows after the other's."""
    if group is None:
        return tensor
    return torch.cat(all_of(tensor.cpu(), group)).to(tensor.device)


class RankSums:
    """``Sums`` over the samples of all ranks, the same on each.

    Samples are numbered through, one rank's after the other's.

    Args:
        own: The sums over this rank's samples.
        sizes: How many samples each rank has.
        group: The process group.
    """

    def __init__(self, own: Sums, sizes: Sequence[int], group: Any) -> None:
        self._own, self._sizes, self._group = own, list(sizes), group

    def sums_by_sample(self) -> Tensor:
        """See ``Sums``."""
        return gathered(self._own.sums_by_sample(), self._group)

    def sums_by_entry(self) -> dict[str, Tensor]:
        """See ``Sums``."""
        sums = self._own.sums_by_entry()
        if self._group is not None:
            for name in sums:
                sums[name] = sums[name].contiguous()
                torch.distributed.all_reduce(sums[name], group=self._group)
        return sums

    def keep_samples(self, kept: Tensor) -> None:
        """See ``Sums``."""
        parts = split(kept, self._sizes)
        self._own.keep_samples(parts[rank_in(self._group)])
        self._sizes = [len(part) for part in parts]

    def keep_entries(self, kept: SparseMask, mask: SparseMask) -> None:
        """See ``Sums``."""
        self._own.keep_entries(kept, mask)
