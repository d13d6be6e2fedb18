"""Another mask in the middle of training: what an optimizer's groups and states become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fishkern.names import some
from fishkern.optim.checkpoint import check_mask
from fishkern.optim.cohorts import transfer
from fishkern.optim.roles import check_unsharded, group_owners, index_of, leaf_owner
from fishkern.optim.states import MOMENTS, Entry, Groups, State
from fishkern.selection.masks import SparseMask


def check_new_mask(mask: Any, own: SparseMask | None, groups: Groups, state: State) -> SparseMask:
    """Refuse a change of mask that cannot be made; returns the old mask.

    Raises:
        TypeError: The new mask is none.
        ValueError: The optimizer has no mask, or moments of which single entries cannot be moved.
    """
    if not isinstance(mask, SparseMask):
        raise TypeError(
            f"the new mask is a {type(mask).__name__}: pass a SparseMask, as fishkern.select "
            f"returns it"
        )
    if own is None:
        raise ValueError(
            "the optimizer was built without a mask and trains everything: build it with the names "
            "of its parameters and a mask of all entries (mask=) to change that mask later"
        )
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            check_unsharded(name, param)
            entry = state.get(param) or {}
            for moment in MOMENTS:
                if moment in entry and entry[moment].dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"{moment} of {name} is {entry[moment].dtype}: a mask can be changed only "
                        f"with state_dtype=torch.float32"
                    )
    return own


def remasked(
    groups: Groups, state: State, old: SparseMask, new: SparseMask, unlisted: str
) -> dict[Tensor, dict[str, Any]]:
    """The states of an optimizer without leaves under a new mask; nothing is changed.

    Raises:
        ValueError: There are leaves, or the mask does not fit the parameters.
    """
    if owners := group_owners(groups):
        raise ValueError(
            f"the optimizer trains leaves of train_only, of {some(sorted(owners))}: call "
            f"handle.set_mask(new_mask, optimizer), which makes them anew"
        )
    check_mask(new, groups, unlisted)
    moved: dict[Tensor, dict[str, Any]] = {}
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            before, after = (index_of(name, mask, unlisted) for mask in (old, new))
            entry = state.get(param)
            if not entry or (before is None and after is None):
                continue
            moved[param] = Entry(_moved(entry, param, before, after))
    return moved


def _moved(
    entry: dict[str, Any], param: Tensor, before: Tensor | None, after: Tensor | None
) -> dict[str, Any]:
    """A state under other positions, None being all of them."""
    every = torch.arange(param.numel(), device=param.device)
    old, new = (every if index is None else index.to(every) for index in (before, after))
    state = transfer(entry, old, new)
    if after is None:
        state |= {key: state[key].view(param.shape) for key in MOMENTS if key in state}
    return state


def check_leaves(
    groups: Groups, old: SparseMask, new: SparseMask, handles: SparseMask, held: Iterable[Tensor]
) -> None:
    """Refuse an optimizer that does not hold a handle's leaves, or has no place for new ones.

    Raises:
        ValueError: Says what is missing.
    """
    if old != handles:
        raise ValueError(
            "the optimizer has another mask than the handle: build it with "
            "FishSparseAdamW(model.named_parameters(), mask=handle.mask)"
        )
    params = {id(param) for group in groups for param in group["params"]}
    if missing := sum(id(leaf) not in params for leaf in held):
        raise ValueError(
            f"the optimizer holds not all of the handle's leaves ({missing} are missing): pass the "
            f"optimizer that trains this model"
        )
    known = {leaf_owner(name) or name for group in groups for name in group["param_names"]}
    homeless = [name for name in new if len(new[name]) and name not in known]
    if homeless and len(groups) > 1:
        raise ValueError(
            f"the new mask selects in {some(homeless)}, which none of the optimizer's "
            f"{len(groups)} groups has: give each group also the frozen weights of its tensors "
            f"(model.named_parameters() has them), or select only in known ones"
        )


def exchange_leaves(
    groups: Groups, state: State, old: SparseMask, new: SparseMask, named: Mapping[str, Tensor]
) -> None:
    """Put a model's new leaves in the place of the old ones, with what stays of their states.

    A tensor without selected entries stands in its group as its frozen weight. Each group is in
    the order of ``named``, as an optimizer that is built anew.

    Args:
        groups: The optimizer's, changed in place.
        state: Its states, changed in place.
        old: The mask of the leaves that are in the groups.
        new: That of the leaves that are in the model.
        named: The model's parameters by their canonical names, leaves included.
    """
    current = {owner: name for name in named if (owner := leaf_owner(name)) is not None}
    known = {leaf_owner(name) or name for group in groups for name in group["param_names"]}
    rank = {name: i for i, name in enumerate(named)}
    none = torch.empty(0, dtype=torch.int32, device="cpu")
    for group in groups:
        pairs = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            owner = leaf_owner(name) or name
            if owner not in old and owner not in new:
                pairs.append((name, param))  # trained whole
                continue
            name_now = current.get(owner, owner)
            after = named[name_now]
            entry = state.pop(param, None)
            if entry:
                device = after.device
                positions = [m.get(owner, none).to(device) for m in (old, new)]
                state[after] = Entry(transfer(entry, *positions))
            pairs.append((name_now, after))
        if group is groups[0]:
            pairs += [(name, named[name]) for owner, name in current.items() if owner not in known]
        pairs.sort(key=lambda pair: rank.get(pair[0], len(rank)))
        group["param_names"] = [name for name, _ in pairs]
        group["params"] = [param for _, param in pairs]
