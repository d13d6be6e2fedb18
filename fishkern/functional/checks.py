"""What the doors of several ops check in the same way."""

from __future__ import annotations

import torch
from torch import Tensor


def check_accumulator(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse an accumulator of another dtype or shape."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {tensor.dtype}: accumulate in float32")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Refuse to write a tensor that is expanded: several of its entries are one number."""
    if tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}: it is "
            f"expanded, several of its entries are one number; pass a contiguous() copy, or what "
            f"was expanded"
        )


def check_mask(
    name: str, mask: Tensor | None, shape: tuple[int, ...], sample_scores: Tensor | None
) -> None:
    """Refuse a mask of another dtype or shape, or one without scores that it restricts."""
    if mask is None:
        return
    if sample_scores is None:
        raise ValueError(f"{name} restricts sample_scores, which is None: pass both or neither")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}: pass a bool tensor")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} has shape {list(mask.shape)}, the parameter {list(shape)}")
