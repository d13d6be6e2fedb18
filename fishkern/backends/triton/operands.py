"""What the launchers of the per-sample kernels share: dtypes and strides as kernel arguments."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def strides(tensor: Tensor | None, *letters: str) -> dict[str, int]:
    """The strides as kernel arguments ``stride_<letters>``; zeros where there is no tensor."""
    found = (0,) * len(letters) if tensor is None else tensor.stride()
    return {f"stride_{name}": stride for name, stride in zip(letters, found, strict=True)}


def check_dtypes(operands: dict[str, Tensor | None], *accumulators: Tensor | None) -> None:
    """Refuse what the kernels do not have.

    Raises:
        TypeError: An operand is not float32, bfloat16 or float16, an accumulator not float32.
    """
    for name, tensor in operands.items():
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: the triton backend takes float32, bfloat16 "
                f'and float16; use_backend("reference") runs every dtype'
            )
    for tensor in accumulators:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(
                f"an accumulator has dtype {tensor.dtype}: the triton backend accumulates in "
                f'float32; use_backend("reference") runs every dtype'
            )
