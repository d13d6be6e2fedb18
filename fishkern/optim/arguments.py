"""What FishSparseAdamW is given, checked and put in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fishkern.optim.quantized import check_state_dtype
from fishkern.optim.roles import UNLISTED
from fishkern.selection.masks import SparseMask


def as_groups(params: Any) -> Any:
    """Parameters as copied groups with lists in them; what torch refuses is left for it."""
    if isinstance(params, Tensor):
        return params
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [_with_list(group) if isinstance(group, dict) else group for group in groups]


def _with_list(group: dict[str, Any]) -> dict[str, Any]:
    params = group["params"]
    if not isinstance(params, set):
        params = [params] if isinstance(params, Tensor) else list(params)
    return {**group, "params": params}


CAPTURABLE = (
    "check_numerics=True reads what a step wrote, which a CUDA graph cannot: leave out "
    "capturable=True while you look"
)


def check_options(
    mask: Any,
    unlisted: str,
    differentiable: bool,
    capturable: bool,
    state_dtype: torch.dtype,
    check_numerics: bool,
) -> None:
    """Refuse options that are wrong or not available.

    Raises:
        TypeError: ``mask`` is not a SparseMask.
        ValueError: An option has no such value.
    """
    if mask is not None and not isinstance(mask, SparseMask):
        raise TypeError(
            f"mask is a {type(mask).__name__}: pass a SparseMask, as fishkern.select returns it or "
            f"as SparseMask(indices, shapes) makes it"
        )
    if unlisted not in UNLISTED:
        raise ValueError(f"unlisted is {unlisted!r}: choose one of {', '.join(UNLISTED)}")
    if differentiable:
        raise ValueError(
            "differentiable=True, but selected entries are updated in place: use "
            "torch.optim.AdamW to differentiate through a step"
        )
    check_state_dtype(state_dtype)
    if check_numerics and capturable:
        raise ValueError(CAPTURABLE)
