"""What an optimizer does with each parameter: train all of it, some entries, none, or ignore it.

A role follows from the parameter's name, the mask and ``unlisted`` alone, so nothing about it has
to be stored, pickled or kept in step. It is an index tensor: the sorted flat positions to train,
an empty one where there are none, and None where the whole parameter is trained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fishkern.functional.checks import check_own_memory
from fishkern.names import canonical_name, some, suggest
from fishkern.selection.masks import BoundMask, SparseMask
from fishkern.tensors import is_sharded
from fishkern.training import leaves

UNLISTED = ("error", "train", "freeze")

Named = list[tuple[str, Tensor]]


def leaf_owner(name: str) -> str | None:
    """The dense parameter whose selected values the leaf ``name`` holds; None for other names.

    Example:
        >>> leaf_owner("encoder.q.fishkern_leaves.weight")
        'encoder.q.weight'
    """
    parts = name.split(".")
    return (
        ".".join(part for part in parts if part != leaves.CHILD) if leaves.CHILD in parts else None
    )


def group_owners(groups: Iterable[dict[str, Any]]) -> set[str]:
    """The owners of all leaves in the groups, whose parameters are tensors or named pairs."""
    names: list[str] = []
    for group in groups:
        names += group.get("param_names") or ()
        names += (entry[0] for entry in group["params"] if isinstance(entry, tuple))
    return {owner for name in names if (owner := leaf_owner(canonical_name(name))) is not None}


def index_of(name: str, mask: SparseMask | None, unlisted: str) -> Tensor | None:
    """The positions to train in the parameter ``name``; None: all of them."""
    if mask is None or leaf_owner(name) is not None:
        return None
    if name not in mask:
        return None if unlisted == "train" else torch.empty(0, dtype=torch.int32, device="cpu")
    index = mask[name]
    return None if index.numel() == math.prod(mask.shapes[name]) else index


def name_all(
    params: list[Any], names: Sequence[str] | None, mask: SparseMask | None
) -> Named | None:
    """Pairs (canonical name, parameter); None where no mask needs names and not all have one.

    Args:
        params: Tensors or (name, tensor) pairs.
        names: The names of tensors that come without, in their order.
        mask: A bound mask knows the names of its model's parameters.

    Raises:
        TypeError: Something is not a tensor.
        ValueError: The mask needs names that are not there, or a name stands twice.
    """
    if names is not None and len(names) != len(params):
        raise ValueError(f"{len(names)} param_names for {len(params)} params: name each once")
    entries: list[Any] = list(params) if names is None else list(zip(names, params, strict=True))
    paired = sum(isinstance(entry, tuple) for entry in entries)
    if paired not in (0, len(entries)):
        if mask is None:
            return None  # torch refuses them
        raise ValueError(f"{paired} of {len(entries)} parameters have names: name all or none")
    if not paired:
        if mask is None:
            return None
        entries = [(_bound_name(i, param, mask), param) for i, param in enumerate(entries)]
    for name, param in entries:
        if not isinstance(param, Tensor):
            raise TypeError(f"{name} is a {type(param).__name__}: an optimizer takes tensors")
    return [(canonical_name(name), param) for name, param in entries]


def _bound_name(i: int, param: Tensor, mask: SparseMask) -> str:
    if not isinstance(mask, BoundMask):
        raise ValueError(
            "the mask goes by names, but the parameters came without: pass "
            "model.named_parameters(), or mask=mask.bind(model)"
        )
    name = mask.name_of(param)
    if name is None:
        shape = list(param.shape) if isinstance(param, Tensor) else param
        raise ValueError(
            f"parameter {i} of the group, of shape {shape}, is not in the model that the mask is "
            f"bound to: bind the mask to the model that is trained, or pass "
            f"model.named_parameters()"
        )
    return name


def admit(named: Named, mask: SparseMask, unlisted: str, owners: set[str]) -> Named:
    """The parameters that the optimizer takes: those in the mask, and the trainable unlisted.

    Args:
        named: Canonical names and parameters of a group.
        mask: What to train.
        unlisted: What becomes of a trainable parameter outside the mask.
        owners: Names of dense parameters whose leaves are here; they are left to their leaves.

    Raises:
        ValueError: A parameter does not fit its mask, or is unlisted and ``unlisted="error"``.
    """
    taken, strangers = [], []
    for name, param in named:
        owner = leaf_owner(name)
        if owner is not None:
            _check_leaf(name, owner, param, mask)
        elif name in owners:
            continue
        elif name in mask:
            _check_dense(name, param, mask)
        elif not param.requires_grad:
            continue
        else:
            strangers.append(name)
        taken.append((name, param))
    if strangers and unlisted == "error":
        known = suggest(strangers[0], [name for name in mask if name not in dict(named)])
        raise ValueError(
            f"{some(strangers)} {'is' if len(strangers) == 1 else 'are'} trainable but not in "
            f'the mask: choose unlisted="train" to train them whole or unlisted="freeze" to leave '
            f"them as they are, or call requires_grad_(False) on them{known}"
        )
    return taken


def check_distinct(names: Sequence[str], params: Sequence[Tensor], before: set[str]) -> None:
    """Refuse a parameter that stands twice in a group, or a name that stands twice at all.

    Raises:
        ValueError: Names it.
    """
    if len({id(param) for param in params}) != len(params):
        raise ValueError(f"one of {len(params)} parameters stands twice in its group: pass it once")
    twice = [name for name, count in Counter([*before, *names]).items() if count > 1]
    if twice:
        raise ValueError(
            f"two parameters are named {some(twice)} (without wrappers' prefixes): pass each "
            f"parameter once, under a name of its own"
        )


def check_trainable(name: str, param: Tensor) -> None:
    """Refuse what AdamW's formula has no meaning for.

    Raises:
        ValueError: The parameter is complex or not floating, expanded, or made of several tensors.
    """
    if not param.is_floating_point():
        raise ValueError(
            f"{name} has dtype {param.dtype}, which cannot be trained here: leave it out"
            + (", or train torch.view_as_real of it" if param.is_complex() else "")
        )
    check_own_memory(name, param)
    inner: Sequence[str] = (
        param.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(param) else ()
    )
    # A DTensor names its mesh there, too.
    parts = [part for part in inner if isinstance(getattr(param, part), Tensor)]
    if len(parts) > 1:
        raise ValueError(
            f"{name} is a {type(param).__name__}, which is made of several tensors "
            f"({', '.join(parts)}), but has one state here: leave it out, or train a plain tensor"
        )


def check_unsharded(name: str, param: Tensor) -> None:
    """Refuse a shard: the mask's positions are those of the whole parameter.

    Raises:
        ValueError: The parameter is a DTensor.
    """
    if is_sharded(param):
        raise ValueError(
            f"{name} is sharded (a DTensor), but its mask has positions in the whole parameter: "
            f"train with DistributedDataParallel, or without a mask"
        )


def check_answered(names: Iterable[str], mask: SparseMask) -> None:
    """Refuse a mask that selects in parameters which are not there.

    Raises:
        ValueError: Names them.
    """
    present = {leaf_owner(name) or name for name in names}
    missing = [name for name in mask if name not in present and mask[name].numel()]
    if missing:
        raise ValueError(
            f"the mask selects entries of {some(missing)}, but the optimizer has no such "
            f"parameter{suggest(missing[0], present - set(mask))}: pass all of "
            f"model.named_parameters(), add the missing group, or select among the parameters "
            f"that are there"
        )


def check_group(group: dict[str, Any], groups: Iterable[dict[str, Any]], mask: SparseMask) -> None:
    """Refuse a group of which, among all groups, the mask cannot be applied as it is now.

    Raises:
        ValueError: Names are missing, a parameter is another one than the mask's, or the mask
            selects in parameters that are not there.
    """
    names, params = group.get("param_names", ()), group["params"]
    if len(names) != len(params):
        raise ValueError(
            f"a group has {len(params)} parameters but {len(names)} param_names, by which the "
            f"mask finds them: whoever replaces a group has to keep its names"
        )
    check_answered(chain.from_iterable(g.get("param_names", ()) for g in groups), mask)
    for name, param in zip(names, params, strict=True):
        if name in mask and leaf_owner(name) is None:
            _check_dense(name, param, mask)
            check_unsharded(name, param)


def _check_dense(name: str, param: Tensor, mask: SparseMask) -> None:
    """Refuse a parameter that is not the one the mask was made for.

    Raises:
        ValueError: Its shape is another one, or its dtype cannot be trained.
    """
    check_trainable(name, param)
    if tuple(param.shape) != tuple(mask.shapes[name]):
        raise ValueError(
            f"{name} has shape {list(param.shape)}, but the mask was made for "
            f"{list(mask.shapes[name])}: select again for this model"
        )


def _check_leaf(name: str, owner: str, param: Tensor, mask: SparseMask) -> None:
    if owner not in mask:
        raise ValueError(
            f"{name} holds selected values of {owner!r}, which is not in the mask: pass the mask "
            f"that train_only was given"
        )
    expected = mask[owner].numel()
    if tuple(param.shape) != (expected,) or param.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is {param.dtype} {list(param.shape)}, but the mask selects [{expected}] "
            f"float32 values of {owner!r}: pass the mask that train_only was given"
        )
    home = leaves.home_of(param)
    if home is not None and not torch.equal(home.indices.cpu(), mask[owner].cpu()):
        raise ValueError(
            f"{name} holds other entries of {owner!r} than the mask selects, though as many: pass "
            f"the mask that train_only was given"
        )
