"""Optimizer checkpoints: torch's layout, with the mask in the groups and every dtype kept.

``Optimizer.load_state_dict`` casts whatever it finds to the parameter's dtype, which ruins float32
moments of bfloat16 parameters; what is here takes its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fishkern.optim.masters import MASTER, add_masters
from fishkern.optim.quantized import check_saved
from fishkern.optim.roles import (
    admit,
    check_answered,
    group_owners,
    index_of,
    leaf_owner,
)
from fishkern.optim.states import MOMENTS, Entry, Groups
from fishkern.selection.masks import SparseMask
from fishkern.tensors import is_sharded, wide_dtype

#: What a live group has for its checkpoint's mask. torch.distributed.checkpoint takes out of a
#: flattened checkpoint only what the live groups have a key for.
MASK_ELSEWHERE = "see optimizer.mask"


def add_masks(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Let the mask travel in a checkpoint's groups; the live ones only say that there is one.

    The states become plain dicts, which ``torch.load(weights_only=True)`` reads.
    """
    state_dict["state"] = {
        key: dict(entry) if isinstance(entry, Entry) else entry
        for key, entry in state_dict["state"].items()
    }
    add_masters(state_dict, optimizer.param_groups)
    if optimizer.mask is not None:
        for group in state_dict["param_groups"]:
            group["mask"] = _pack_mask(optimizer.mask, group.get("param_names", ()))
            # Without effect here, but a stock AdamW that loads this would let its fused kernel,
            # which compares no shapes, write behind moments of selected entries alone.
            group["fused"] = None


def apart(
    state: dict[Tensor, dict[str, Any]], mask: SparseMask | None
) -> tuple[defaultdict[Tensor, dict[str, Any]], SparseMask | None]:
    """States and mask without views: pickled one by one, each would carry all of what it views."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and not is_sharded(value) and value._base is not None:
            return value.clone()
        return value

    states = {param: {k: own(v) for k, v in entry.items()} for param, entry in state.items()}
    if mask is not None:
        mask = mask._with_indices({name: own(index) for name, index in mask.items()})
    return defaultdict(dict, states), mask


def _pack_mask(mask: SparseMask, names: Iterable[str]) -> dict[str, Any]:
    """The part of the mask that concerns a group, as plain data for a checkpoint.

    Returns:
        ``{"fingerprint": str, "indices": {name: Tensor}, "shapes": {name: list[int]}}``; the
        fingerprint is that of the whole mask.
    """
    known = [name for name in (leaf_owner(name) or name for name in names) if name in mask]
    return {
        "fingerprint": mask.fingerprint,
        "indices": {name: mask[name] for name in known},
        "shapes": {name: list(mask.shapes[name]) for name in known},
    }


def unpack_masks(groups: Groups) -> SparseMask | None:
    """The mask that a checkpoint's groups hold together; None where they hold none."""
    parts = [group["mask"] for group in groups if isinstance(group.get("mask"), dict)]
    if not parts:
        return None
    indices = {name: index for part in parts for name, index in part["indices"].items()}
    shapes = {name: shape for part in parts for name, shape in part["shapes"].items()}
    return SparseMask(indices, shapes)


def agree(saved: SparseMask | None, own: SparseMask | None, computed: bool) -> SparseMask | None:
    """The mask to go on with: the checkpoint's where the optimizer's own was computed.

    Raises:
        ValueError: One of the two has no mask, or an explicitly given mask is another one.
    """
    if saved is None and own is None:
        return None
    if saved is None or own is None:
        has, lacks = ("optimizer", "checkpoint") if saved is None else ("checkpoint", "optimizer")
        raise ValueError(
            f"the {has} has a mask and the {lacks} has none: give the optimizer the mask that the "
            f"checkpoint was trained with, or none for a checkpoint of plain AdamW"
        )
    different = difference(saved, own)
    if not different:
        return own
    if computed:
        return saved
    raise ValueError(
        f"the checkpoint was trained with another mask than the optimizer's: {different}. Pass "
        f"the checkpoint's mask, or start without the checkpoint"
    )


def difference(saved: SparseMask, own: SparseMask) -> str:
    """In which tensors two masks select differently, and how many entries; empty if nowhere."""
    counts: dict[str, int] = {}
    for name in dict.fromkeys([*saved, *own]):
        a, b = (m[name].cpu() if name in m else torch.empty(0, device="cpu") for m in (saved, own))
        if not torch.equal(a, b):
            counts[name] = len(a) + len(b) - 2 * int(torch.isin(a, b).sum())
    counts = {name: count for name, count in counts.items() if count}
    if not counts:
        return ""
    shown = ", ".join(f"{name!r} ({count} entries)" for name, count in list(counts.items())[:5])
    more = f" and {len(counts) - 5} more tensors" if len(counts) > 5 else ""
    return f"{sum(counts.values())} entries differ, in {shown}{more}"


def check_groups(saved: Groups, own: Groups) -> None:
    """Refuse a checkpoint whose groups are not those of the optimizer.

    Raises:
        ValueError: Other numbers of groups or parameters, or parameters of other names.
    """
    if len(saved) != len(own):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, the optimizer {len(own)}: build "
            f"the optimizer with the groups of the checkpoint"
        )
    for i, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"group {i} has {len(theirs['params'])} parameters in the checkpoint, "
                f"{len(ours['params'])} in the optimizer: build the optimizer with the groups of "
                f"the checkpoint"
            )
        names = zip(theirs.get("param_names", ()), ours.get("param_names", ()), strict=False)
        if "mask" in theirs and (odd := [pair for pair in names if pair[0] != pair[1]]):
            raise ValueError(
                f"{len(odd)} parameters of group {i} have other names in the checkpoint, first "
                f"{odd[0][0]!r} where the optimizer has {odd[0][1]!r}: pass the parameters in the "
                f"checkpoint's order"
            )


def check_mask(mask: SparseMask, groups: Groups, unlisted: str) -> None:
    """Refuse a mask that does not fit the optimizer's parameters.

    Raises:
        ValueError: As when an optimizer is built with it.
    """
    owners = group_owners(groups)
    for group in groups:
        admit(list(zip(group["param_names"], group["params"], strict=True)), mask, unlisted, owners)
    check_answered(chain.from_iterable(group["param_names"] for group in groups), mask)


def unpack_state(
    state: dict[Any, Any],
    saved: Groups,
    own: Groups,
    mask: SparseMask | None,
    unlisted: str,
    state_dtype: torch.dtype,
) -> defaultdict[Tensor, dict[str, Any]]:
    """The checkpoint's states, copied, keyed by the optimizer's parameters.

    Raises:
        ValueError: A moment has not the shape that the mask asks for, or another type.
    """
    places = {}
    for theirs, ours in zip(saved, own, strict=True):
        names = ours.get("param_names") or [f"parameter {key}" for key in theirs["params"]]
        for key, param, name in zip(theirs["params"], ours["params"], names, strict=True):
            places[key] = (param, name, theirs.get("capturable", False))
    loaded: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, entry in state.items():
        if key not in places:
            loaded[key] = deepcopy(entry)  # belongs to no parameter
            continue
        param, name, capturable = places[key]
        index = index_of(name, mask, unlisted)
        shape = param.shape if index is None else index.shape
        for moment in MOMENTS:
            if moment in entry and entry[moment].shape != shape:
                raise ValueError(
                    f"{moment} of {name} has shape {list(entry[moment].shape)} in the checkpoint, "
                    f"but {list(shape)} is needed: load a checkpoint of the same parameters and "
                    f"the same mask"
                )
        check_saved(name, entry, state_dtype)
        narrow = state_dtype is not torch.float32
        loaded[param] = {
            field: _copied(field, value, param, capturable, narrow)
            for field, value in entry.items()
            if field != MASTER  # it is the parameter's, not a state
        }
    return loaded


def unpack_groups(saved: Groups, own: Groups) -> Groups:
    """The checkpoint's options with the optimizer's parameters; its mask is not kept in them."""
    groups = []
    for theirs, ours in zip(saved, own, strict=True):
        group = deepcopy({k: v for k, v in theirs.items() if k not in ("params", "mask")})
        group["params"] = ours["params"]
        group |= {key: ours[key] for key in ("param_names", "mask") if key in ours}
        groups.append(group)
    return groups


def _copied(field: str, value: Any, param: Tensor, capturable: bool, narrow: bool) -> Any:
    if field == "step":
        device = param.device if capturable else torch.device("cpu")
        return torch.as_tensor(value).to(device=device, dtype=torch.float32, copy=True)
    if not isinstance(value, Tensor):
        return deepcopy(value)
    dtype = wide_dtype(param) if field in MOMENTS and not narrow else value.dtype
    return value.to(
        device=param.device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
    )
