"""What stays when other entries are selected: positions and the values at them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishkern.selection.masks import SparseMask


def common(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the ascending ``new`` positions are in ``old``, bool ``[k]``, and where there."""
    if not len(old):
        return torch.zeros_like(new, dtype=torch.bool), new[:0].long()
    where = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    stays = old[where] == new
    return stays, where[stays]


def carry_over(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], mask: SparseMask, before: SparseMask
) -> None:
    """Give new leaves the values, and whether they are trained, of old ones where both have them.

    Args:
        new: The leaves of ``mask`` by the names of their weights.
        old: Those of the mask ``before``.
        mask: What is selected now.
        before: What was.
    """
    for name in new.keys() & old.keys():
        leaf, source = new[name], old[name].detach()
        leaf.requires_grad_(old[name].requires_grad)
        stays, where = common(mask[name].to(leaf.device), before[name].to(leaf.device))
        leaf.detach()[stays] = source[where]
