"""What every layer asks of a tensor: whether it is sharded, how wide to compute, single entries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather", "is_sharded", "scatter", "wide_dtype"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked by attribute, since importing DTensor takes long."""
    return hasattr(tensor, "placements")


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What to compute in for a tensor: float32, or float64 for float64.

    Also the dtype of a weight's leaf and moments.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def gather(tensor: Tensor, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The entries at flat positions."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1).index_select(0, indices).to(dtype)
    return tensor.detach().take(indices.long()).to(dtype)


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write entries at flat positions, in the tensor's dtype."""
    values = values.detach().to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.data.view(-1)[indices] = values
    else:
        tensor.data.put_(indices.long(), values)
