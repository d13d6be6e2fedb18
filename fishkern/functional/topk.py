"""Exact global top-k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)


def topk_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The positions of the k largest scores over a whole list of tensors, exactly k of them.

    The scores are neither copied nor sorted. Ties go to the earlier tensor and, within a tensor,
    to the lower position, so that the result does not depend on the device or thread count.

    Args:
        scores: float32 tensors of any shape, without NaN; float64 too on the "reference" backend
            (``fishkern.use_backend``), not in the C++ kernel.
        k: How many, from 0 to the number of all scores.

    Returns:
        For each tensor the flat positions selected in it: int64, 1-D, ascending, maybe empty.

    Raises:
        ValueError: ``k`` is negative or larger than the number of scores.
        TypeError: A tensor is neither float32 nor float64.
        RuntimeError: A tensor is float64, and the C++ kernel runs.

    Example:
        >>> import torch
        >>> topk_indices([torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 2.0]])], 3)
        [tensor([0, 1]), tensor([1])]
    """
    total = sum(s.numel() for s in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k is {k}, but there are {total} scores: choose k from 0 to {total}")
    for i, score in enumerate(scores):
        if score.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"scores[{i}] has dtype {score.dtype}: pass float32")
    indices: list[Tensor] = torch.ops.fishkern.topk_indices(list(scores), k)
    return indices
