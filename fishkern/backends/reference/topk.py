"""Exact global top-k over a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def topk_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The flat positions of the k largest scores over all tensors, sorted, one list per tensor.

    Exactly k in all. Ties go to the earlier tensor, then to the lower position: a stable
    descending sort of the concatenation, cut after k.
    """
    flat = torch.cat([s.reshape(-1) for s in scores]) if len(scores) else torch.empty(0)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[:k]] = True
    return [part.nonzero().view(-1) for part in chosen.split([s.numel() for s in scores])]
