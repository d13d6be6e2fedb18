"""What train_only has to do around the steps of whichever optimizer holds its leaves."""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from fishkern.names import some
from fishkern.tensors import is_sharded
from fishkern.training import leaves


class Followed(Protocol):
    """A handle, as far as steps concern it."""

    def _all_leaves(self) -> dict[str, nn.Parameter]:
        """The leaves, by the names of their weights."""
        ...

    def sync(self) -> None:
        """Bring leaves and weights together."""
        ...


_followed: weakref.WeakSet[Any] = weakref.WeakSet()
_unstepped: weakref.WeakSet[Any] = weakref.WeakSet()  # whose leaves have not made a step yet


@dataclass(slots=True, eq=False)
class _Look:
    """Which handles' leaves an optimizer held when it had these parameters."""

    params: list[int]
    generation: int
    holding: weakref.WeakSet[Any]
    is_checked: bool = False  # that it was not built before attaching


_looks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by optimizers


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


_own_hooks: set[int] = set()  # their keys among torch's


def _register_hooks() -> None:
    """Not before anything is attached: every optimizer's step pays for them."""
    if not _own_hooks & _global_optimizer_pre_hooks.keys():
        _own_hooks.add(register_optimizer_step_pre_hook(_before_step).id)
    if not _own_hooks & _global_optimizer_post_hooks.keys():
        _own_hooks.add(register_optimizer_step_post_hook(_after_step).id)


def are_only_hooks() -> bool:
    """Whether torch's hooks of all optimizers' steps are none but these here.

    An optimizer that writes the weights of leaves itself may then call ``before_step`` alone.
    """
    return _own_hooks.issuperset(_global_optimizer_pre_hooks) and _own_hooks.issuperset(
        _global_optimizer_post_hooks
    )


def before_step(optimizer: Optimizer) -> None:
    """Refuse what would train nothing, and gradients that the ranks do not share.

    Raises:
        RuntimeError: Leaves that were removed; an optimizer built before attaching; gradients that
            differ between ranks.
    """
    if leaves.any_removed():
        for group in optimizer.param_groups:
            for param in group["params"]:
                leaves.home_of(param)  # refuses those
    waiting = list(_unstepped)
    if not waiting:
        return
    look = _look(optimizer)
    if not look.is_checked:
        for handle in waiting:
            _check_built_after(optimizer, set(look.params), handle)
        look.is_checked = True
    for handle in waiting:
        if handle in look.holding and _compare_ranks(handle._all_leaves()):
            _unstepped.discard(handle)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        before_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After any optimizer's step the weights follow the leaves that it holds."""
    if getattr(optimizer, "writes_weights_of_leaves", False):
        return
    for handle in list(_look(optimizer).holding):
        handle.sync()


def _look(optimizer: Optimizer) -> _Look:
    """What the optimizer holds; looked for anew where something has changed."""
    params = [id(param) for group in optimizer.param_groups for param in group["params"]]
    look: _Look | None = _looks.get(optimizer)
    if look is None or look.params != params or look.generation != leaves.generation():
        held = set(params)
        holding = weakref.WeakSet(
            handle
            for handle in _followed
            if not held.isdisjoint(map(id, handle._all_leaves().values()))
        )
        look = _looks[optimizer] = _Look(params, leaves.generation(), holding)
    return look


def _check_built_after(optimizer: Optimizer, held: set[int], handle: Followed) -> None:
    """Refuse an optimizer of weights that are frozen now, and whose leaves it does not have.

    Raises:
        RuntimeError: Names the weights.
    """
    stale = [
        name
        for name, leaf in handle._all_leaves().items()
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
