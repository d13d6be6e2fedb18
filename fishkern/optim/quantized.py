"""Moments in fewer bits: what a state then holds, and what cannot have them.

``state_dtype=torch.bfloat16`` keeps both moments so; ``torch.uint8`` keeps a byte of each, and for
each 32 entries in a row a byte that scales them, ``exp_avg_scale`` and ``exp_avg_sq_scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fishkern.functional.adamw_quantized import NARROW, dequantize_moment, scale_count
from fishkern.tensors import is_sharded, wide_dtype

SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
WIDE = "state_dtype=torch.float32"


def check_state_dtype(state_dtype: Any) -> None:
    """Refuse types that moments are not kept in.

    Raises:
        ValueError: Names those that there are.
    """
    if state_dtype is not torch.float32 and state_dtype not in NARROW:
        raise ValueError(
            f"state_dtype is {state_dtype}: choose torch.float32, torch.bfloat16, or torch.uint8 "
            f"for 8 bits with a scale for each 32 entries"
        )


def check_quantizable(group: dict[str, Any], state_dtype: torch.dtype) -> None:
    """Refuse a group whose moments cannot be kept in this type.

    Raises:
        ValueError: It has amsgrad, or parameters in float64 or sharded.
    """
    if state_dtype is torch.float32:
        return
    if group["amsgrad"]:
        raise ValueError(
            f"amsgrad=True keeps a maximum that only float32 holds: choose {WIDE} with it, not "
            f"{state_dtype}"
        )
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        if param.requires_grad and (is_sharded(param) or wide_dtype(param) is not torch.float32):
            kind = "sharded (a DTensor)" if is_sharded(param) else f"in {param.dtype}"
            raise ValueError(
                f"{name} is {kind}, but moments in {state_dtype} are for whole parameters in "
                f"float32, bfloat16 or float16: choose {WIDE}"
            )


def scales_of(state_dtype: torch.dtype) -> tuple[str, ...]:
    """The names of the scales that a state has beside its moments."""
    return tuple(SCALES.values()) if state_dtype is torch.uint8 else ()


def zero_scales(moment: Tensor) -> Tensor:
    """The scales of moments that are zero: uint8 ``[ceil(k / 32)]``."""
    return torch.zeros(scale_count(moment.numel()), dtype=torch.uint8, device=moment.device)


def moment_of(entry: dict[str, Any], key: str) -> Tensor:
    """A moment of a state in float32, whatever it is kept in."""
    moment: Tensor = entry[key]
    if moment.dtype is not torch.uint8:
        return moment
    return dequantize_moment(moment, entry[SCALES[key]], signed=key == "exp_avg")


def check_saved(name: str, entry: dict[str, Any], state_dtype: torch.dtype) -> None:
    """Refuse the state of a parameter from a checkpoint with other moments.

    Floating moments are taken for float32, which holds them exactly; no others are converted.

    Raises:
        ValueError: Says of which type they are, or which scales are wrong.
    """
    for key, scale in SCALES.items():
        if key not in entry:
            continue
        dtype = entry[key].dtype
        widened = state_dtype is torch.float32 and dtype.is_floating_point
        if dtype is not state_dtype and not widened:
            kept = dtype if dtype in NARROW else torch.float32
            raise ValueError(
                f"{key} of {name} is {dtype} in the checkpoint, but the optimizer has "
                f"state_dtype={state_dtype}: build it with state_dtype={kept}"
            )
        if dtype is torch.uint8:
            count, found = scale_count(entry[key].numel()), entry.get(scale)
            if found is None or found.dtype is not torch.uint8 or found.shape != (count,):
                what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ValueError(
                    f"{scale} of {name} is {what} in the checkpoint, but torch.uint8 [{count}] is "
                    f"needed: load a checkpoint that this optimizer's state_dict() has made"
                )
    if state_dtype is not torch.float32 and "max_exp_avg_sq" in entry:
        raise ValueError(
            f"the checkpoint has max_exp_avg_sq of {name}, but amsgrad=True is not there with "
            f"state_dtype={state_dtype}: build the optimizer with {WIDE}"
        )
