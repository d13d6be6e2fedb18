"""What train_only has to do around the steps of whichever optimizer holds its leaves."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from fishkern.names import some
from fishkern.tensors import is_sharded
from fishkern.training import leaves


class Followed(Protocol):
    """A handle, as far as steps concern it."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The leaves, by their names."""
        ...

    def sync(self) -> None:
        """Bring leaves and weights together."""
        ...


_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_unstepped: weakref.WeakSet[Any] = weakref.WeakSet()  # whose leaves have not made a step yet


class _Look(NamedTuple):
    """Which handles' leaves an optimizer held when it had these parameters."""

    params: list[int]
    generation: int
    holding: weakref.WeakSet[Any]


_looks: weakref.WeakKeyDictionary[Optimizer, _Look] = weakref.WeakKeyDictionary()


def follow(handle: Followed) -> None:
    """Let this handle's weights follow its leaves after each optimizer's step."""
    _register_hooks()
    _followed.add(handle)
    _unstepped.add(handle)
    _looks.clear()


def followed() -> set[Any]:
    """The handles of all attached models."""
    return set(_followed)


def forget(handle: Followed) -> None:
    """Nothing is done any more after steps."""
    _followed.discard(handle)
    _unstepped.discard(handle)
    _looks.clear()


_hooks: list[RemovableHandle] = []


def _register_hooks() -> None:
    """Once, and not before anything is attached: every optimizer's step pays for it."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def are_only_hooks(before: Mapping[int, Any], after: Mapping[int, Any]) -> bool:
    """Whether torch's hooks of all optimizers' steps are none but these here.

    An optimizer that writes the weights of leaves itself may then call ``before_step`` alone.
    """
    return len(before) + len(after) <= len(_hooks)


def before_step(optimizer: Optimizer) -> None:
    """Refuse what would train nothing, and gradients that the ranks do not share."""
    if leaves.any_removed():
        for group in optimizer.param_groups:
            for param in group["params"]:
                leaves.home_of(param)  # refuses those
    for handle in list(_unstepped):
        if handle in _holding(optimizer) and _compare_ranks(dict(handle.named_parameters())):
            _unstepped.discard(handle)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        before_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After any optimizer's step the weights follow the leaves that it holds."""
    if getattr(optimizer, "writes_weights_of_leaves", False):
        return
    for handle in list(_holding(optimizer)):
        handle.sync()


def _holding(optimizer: Optimizer) -> weakref.WeakSet[Any]:
    """The handles whose leaves the optimizer holds; looked for where something has changed.

    Raises:
        RuntimeError: It was built before leaves were attached that have made no step yet.
    """
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    look = _looks.get(optimizer)
    if look is None or look.params != params or look.generation != leaves.generation():
        held = set(params)
        for handle in list(_unstepped):
            _check_built_after(optimizer, held, handle)
        holding = weakref.WeakSet(
            handle
            for handle in _followed
            if any(id(leaf) in held for _, leaf in handle.named_parameters())
        )
        look = _looks[optimizer] = _Look(params, leaves.generation(), holding)
    return look.holding


def _check_built_after(optimizer: Optimizer, held: set[int], handle: Followed) -> None:
    """Refuse an optimizer of weights that are frozen now, and whose leaves it does not have.

    Raises:
        RuntimeError: Names the weights.
    """
    stale = [
        name.replace(leaves.CHILD + ".", "")
        for name, leaf in handle.named_parameters()
        if id(leaf) not in held
        and (home := leaves.home_of(leaf)) is not None
        and id(home.weight) in held
    ]
    if stale:
        raise RuntimeError(
            f"the {type(optimizer).__name__} holds {some(stale)}, frozen by train_only, without "
            f"the leaves that are trained in their place: build the optimizer after train_only, "
            f"of model.named_parameters()"
        )


def _compare_ranks(named: dict[str, nn.Parameter]) -> bool:
    """Whether all ranks that train the same leaves have the same gradients; True if it is settled.

    It is not where all gradients are zero, as in the first step that a checkpoint library makes.

    Raises:
        RuntimeError: They have other gradients: their weights would drift apart. Or the leaves are
            sharded.
    """
    if any(map(is_sharded, named.values())):
        raise RuntimeError(leaves.SHARDED)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return True
    what = zlib.crc32(repr([(name, leaf.numel()) for name, leaf in named.items()]).encode())
    device = next(iter(named.values())).device
    own = torch.stack([torch.tensor(what, device=device), _hash(named.values(), device)])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    alike = [(rank, value) for rank, (kind, value) in enumerate(map(Tensor.tolist, others))
             if kind == what]  # fmt: skip
    first, value = alike[0]
    if odd := [rank for rank, other in alike if other != value]:
        raise RuntimeError(
            f"the gradients of the selected entries on rank {odd[0]} are not those on rank "
            f"{first}, so that their weights would drift apart: call train_only before the model "
            f"is wrapped by DistributedDataParallel, which then averages them, and make every "
            f"backward of the first step pass through the wrapper"
        )
    return any(other for _, other in alike)


def _hash(params: Any, device: torch.device) -> Tensor:
    """0-d int64: the bits of the gradients in their order; 0 if all are zero or missing."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for param in params:
        total = total * 31
        if param.grad is not None:
            bits = param.grad.contiguous().view(torch.int32).long()
            places = torch.arange(1, len(bits) + 1, device=bits.device)
            total = total + (bits * places).sum().to(device)
    return total
