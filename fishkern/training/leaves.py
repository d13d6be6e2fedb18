"""The selected values of a module's weights as its trainable leaves, and the alias between them.

A weight with selected entries is frozen; its selected values live in one 1-D float32 leaf. Whoever
reads ``module.weight`` in grad mode gets an alias: the weight itself, without a copy, whose
gradient goes to the leaf, at the selected entries alone. Functional uses, ties and layers that
nobody has heard of therefore train exactly what they should.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fishkern.interception import Site, original_class, registered, run_intercepted, subclass

CHILD = "fishkern_leaves"  # the name of the child module that holds an owner's leaves
INDICES = "_indices"
SETTLED = "_settled"

#: Where each leaf's values belong, for the optimizer's kernel: leaf -> (its module, local name).
_homes: WeakIdKeyDictionary = WeakIdKeyDictionary()


_generation = 0


def generation() -> int:
    """A number that changes whenever a leaf may have got another home."""
    return _generation


class Home(NamedTuple):
    """The dense weight that a leaf's values belong to, and where in it."""

    weight: Tensor
    indices: Tensor


def home_of(leaf: Tensor) -> Home | None:
    """The weight behind a leaf, as it is now; None for any other tensor.

    Raises:
        RuntimeError: The leaf was detached from its weight by ``handle.remove()``.
    """
    if leaf not in _homes:
        return None
    leaves, name = _homes[leaf]
    if leaves is None:
        raise RuntimeError(
            f"a leaf of {leaf.numel()} numbers belongs to no weight any more, since train_only was "
            f"removed: build a new optimizer for the model's own parameters"
        )
    owner = leaves()
    return None if owner is None else owner.home(name)


class Alias(torch.autograd.Function):
    """Forward: the weight, detached. Backward: its gradient's selected entries, for the leaf."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, leaf: Tensor, indices: Tensor) -> Tensor:
        """The weight itself, without a copy."""
        ctx.save_for_backward(indices)
        ctx.dtype = leaf.dtype
        ctx.set_materialize_grads(False)
        return weight.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None, None]:
        """``grad.flatten()[indices]`` for the leaf, nothing for the weight."""
        (indices,) = ctx.saved_tensors
        return None, None if grad is None else gather(grad, indices, ctx.dtype), None


class Leaves(nn.Module):
    """The leaves of one owner, by the local names of its weights, and their indices.

    Nothing of it is in ``state_dict()``: the owner's weights hold the same values. The leaves stay
    float32 whatever the model is cast to.

    Each value exists twice, in its leaf and in its weight, and either may be written by others:
    optimizers and averages write leaves; loading, merging and users write weights, also through
    ``.data``, which no version counter sees. ``reconcile`` therefore compares both with what both
    were when it last ran, entry by entry.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is not taken for a child
        self._seen: dict[str, tuple[int, int, int]] = {}

    def add(self, name: str, leaf: nn.Parameter, indices: Tensor) -> None:
        """Take over the owner's weight ``name``."""
        self.register_parameter(name, leaf)
        self.register_buffer(name + INDICES, indices, persistent=False)
        self.register_buffer(name + SETTLED, leaf.detach().clone(), persistent=False)
        self._register()

    def home(self, name: str) -> Home:
        """The weight behind a leaf."""
        weight, indices = self._owner[0]._parameters[name], self._buffers[name + INDICES]
        assert weight is not None
        assert indices is not None
        return Home(weight, indices)

    def items(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
        """Local name, leaf, weight, indices."""
        for name, leaf in self._parameters.items():
            assert leaf is not None
            yield (name, leaf, *self.home(name))

    @property
    def on_gpu(self) -> bool:
        """Whether comparing costs launches."""
        return any(leaf is not None and leaf.is_cuda for leaf in self._parameters.values())

    @torch.no_grad()
    def reconcile(self, *, thorough: bool = True) -> None:
        """Bring leaf and weight together.

        A weight's entry that was written goes to the leaf - unless it is the leaf's own rounding,
        whose more precise value then stays; any other entry of the weight gets the leaf's value.

        Args:
            thorough: Also look where no version counter moved since the last time.
        """
        for name, leaf, weight, indices in self.items():
            if not isinstance(weight, nn.Parameter):
                continue  # lent to the module for one call, by torch.func.functional_call
            if not thorough and self._seen.get(name) == _stamp(leaf, weight):
                continue
            settled = self._buffers[name + SETTLED]
            assert settled is not None
            values = gather(weight, indices, leaf.dtype)
            written = (values != settled) & (values != rounded(leaf, weight.dtype))
            leaf.copy_(torch.where(written, values, leaf))
            scatter(weight, indices, leaf)
            settled.copy_(rounded(leaf, weight.dtype))
            self._seen[name] = _stamp(leaf, weight)

    def _register(self) -> None:
        global _generation
        _generation += 1
        for name, leaf in self._parameters.items():
            _homes[leaf] = (weakref.ref(self), name)

    def unregister(self) -> None:
        """The leaves are detached: nothing follows them any more."""
        global _generation
        _generation += 1
        for leaf in self._parameters.values():
            _homes[leaf] = (None, "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.reconcile()  # the owner's tensors are in the dict already; they share their memory

    def _load_from_state_dict(self, *args: Any) -> None:
        # The owner's tensors were loaded just before, possibly replaced (assign=True).
        self._register()
        self.reconcile()
        for _, _, weight, _ in self.items():
            weight.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaves:
        """Follow the model to another device, but not to another dtype."""
        self.reconcile()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._register()
        self._seen.clear()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()
        self._seen = {}  # of other tensors


def _stamp(leaf: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return id(weight), weight._version, leaf._version


def rounded(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """The leaf's values as a weight of this dtype holds them, in the leaf's own dtype."""
    return leaf.detach().to(dtype).to(leaf.dtype)


def gather(tensor: Tensor, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The entries at flat positions."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[indices].to(dtype)
    return tensor.detach().take(indices.long()).to(dtype)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """That of a weight's leaf and moments: float32, or float64 for a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write entries at flat positions, in the tensor's dtype."""
    values = values.detach().to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.data.view(-1)[indices] = values
    else:
        tensor.data.put_(indices.long(), values)


@functools.cache
def owner_members(
    names: tuple[str, ...], by_rule: bool
) -> Callable[[type[nn.Module]], dict[str, Any]]:
    """The members of an owner's class: its weights ``names`` read as aliases.

    ``by_rule``: it has a rule that covers them, so that its forward needs no alias.
    """

    def members(cls: type[nn.Module]) -> dict[str, Any]:
        def set_attribute(self: nn.Module, name: str, value: Any) -> None:
            # transformers ties weights by assigning one module's weight to another's.
            cls.__setattr__(self, name, getattr(value, "_fishkern_weight", value))

        def reduce(self: nn.Module, protocol: int) -> Any:
            return _rebuild, (cls, names, by_rule), self.__dict__

        members: dict[str, Any] = {name: property(functools.partial(_read, name)) for name in names}
        members |= {"__setattr__": set_attribute, "__reduce_ex__": reduce}
        if by_rule:
            members["forward"] = _forward
        return members

    return members


def _read(name: str, owner: nn.Module) -> Tensor:
    weight = owner._parameters[name]
    assert weight is not None
    if not torch.is_grad_enabled():
        return weight
    leaves: Any = owner._modules[CHILD]
    leaf, indices = leaves._parameters[name], leaves._buffers[name + INDICES]
    alias: Tensor = Alias.apply(weight, leaf, indices)  # type: ignore[no-untyped-call]
    if not torch.compiler.is_compiling():
        alias._is_param = True  # isinstance(alias, nn.Parameter) holds
        alias._fishkern_weight = weight  # type: ignore[attr-defined]
    return alias


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with a rule: its input and grad_out make the selected gradient."""
    cls = original_class(self)
    rule = registered(cls)
    if rule is None or len(args) != 1 or kwargs or not torch.is_grad_enabled():
        return cls.forward(self, *args, **kwargs)
    leaves: Any = self._modules[CHILD]
    params = {name: p for name in rule.params if (p := self._parameters.get(name)) is not None}
    # A weight that is trained whole beside the leaves (unlisted="train") gets its dense gradient.
    anchors = {
        name: leaves._parameters.get(name, param)
        for name, param in params.items()
        if name in leaves._parameters or param.requires_grad
    }
    selected = {
        name: (leaves._buffers.get(name + INDICES), anchor.dtype)
        for name, anchor in anchors.items()
    }
    site = Site(self, rule, {}, functools.partial(_selected_gradients, selected))
    return run_intercepted(site, args[0], list(anchors.values()))


def _selected_gradients(
    selected: Mapping[str, tuple[Tensor | None, torch.dtype]],
    site: Site,
    x: Tensor,
    grad_out: Tensor,
) -> list[Tensor]:
    """Each leaf's gradient: the dense one is formed, gathered from, and freed."""
    grads = []
    for name, (indices, dtype) in selected.items():
        grad = site.rule.param_grad(site.module, name, x, grad_out)
        grads.append(grad.to(dtype) if indices is None else gather(grad, indices, dtype))
    return grads


def _rebuild(cls: Any, names: tuple[str, ...], by_rule: bool) -> nn.Module:
    """An owner without its content, for pickle and deepcopy."""
    attached = subclass(cls, owner_members(names, by_rule))
    return attached.__new__(attached)
