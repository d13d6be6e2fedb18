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
