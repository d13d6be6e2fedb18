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
    """The weight behind a leaf, as it is now; None for any other tensor."""
    entry = _homes.get(leaf)
    leaves = entry[0]() if entry is not None else None
    return None if leaves is None else leaves.home(entry[1])


class Alias(torch.autograd.Function):
    """Forward: the weight, detached. Backward: its gradient's selected entries, for the leaf."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, leaf: Tensor, indices: Tensor) -> Tensor:
        """The weight itself, without a copy."""
        ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)
        return weight.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None, None]:
        """``grad.flatten()[indices]`` for the leaf, nothing for the weight."""
        (indices,) = ctx.saved_tensors
        return None, None if grad is None else gather(grad, indices), None


class Leaves(nn.Module):
    """The leaves of one owner, by the local names of its weights, and their indices.

    Nothing of it is in ``state_dict()``: the owner's weights hold the same values. The leaves stay
    float32 whatever the model is cast to.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = [owner]  # in a list, so that it is not taken for a child
        self._versions: dict[str, int] = {}

    def add(self, name: str, leaf: nn.Parameter, indices: Tensor) -> None:
        """Take over the owner's weight ``name``."""
        self.register_parameter(name, leaf)
        self.register_buffer(name + INDICES, indices, persistent=False)
        self._settle()

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

    @torch.no_grad()
    def push(self) -> None:
        """Leaf to weight: the weight gets the leaf's values, rounded to its dtype."""
        for name, leaf, weight, indices in self.items():
            scatter(weight, indices, leaf)
            self._versions[name] = weight._version

    @torch.no_grad()
    def pull(self) -> None:
        """Weight to leaf, where a weight was written since: elementwise.

        A leaf whose rounding is what stands in the weight keeps its more precise value.
        """
        for name, leaf, weight, indices in self.items():
            if weight._version != self._versions.get(name):
                values = gather(weight, indices)
                kept = leaf.to(weight.dtype) == values.to(weight.dtype)
                leaf.copy_(torch.where(kept, leaf, values))
                self._versions[name] = weight._version

    def freeze_owner(self) -> None:
        """Adapter libraries switch their weights' flags: the dense weights stay frozen."""
        for _, _, weight, _ in self.items():
            if weight.requires_grad:
                weight.requires_grad_(False)

    def _settle(self) -> None:
        """Make the homes known; what stands in the weights is what stands in the leaves."""
        self._register()
        for name, _, weight, _ in self.items():
            self._versions[name] = weight._version

    def _register(self) -> None:
        global _generation
        _generation += 1
        for name, leaf in self._parameters.items():
            _homes[leaf] = (weakref.ref(self), name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.push()  # the owner's tensors are in the dict already; they share their memory

    def _load_from_state_dict(self, *args: Any) -> None:
        # The owner's tensors were loaded just before, possibly replaced (assign=True).
        self._register()
        self._versions.clear()
        self.pull()
        self.freeze_owner()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaves:
        """Follow the model to another device, but not to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._settle()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()
        self._versions = {}  # of other tensors; the next pull compares


def gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat positions, float32."""
    if tensor.is_contiguous():
        return tensor.view(-1)[indices].float()
    return tensor.take(indices.long()).float()


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write entries at flat positions, in the tensor's dtype."""
    values = values.to(tensor.dtype)
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
    indices = {name: leaves._buffers.get(name + INDICES) for name in anchors}
    site = Site(self, rule, {}, functools.partial(_selected_gradients, indices))
    return run_intercepted(site, args[0], list(anchors.values()))


def _selected_gradients(
    selected: Mapping[str, Tensor | None], site: Site, x: Tensor, grad_out: Tensor
) -> list[Tensor]:
    """Each leaf's gradient: the dense one is formed, gathered from, and freed."""
    grads = []
    for name, indices in selected.items():
        grad = site.rule.param_grad(site.module, name, x, grad_out)
        grads.append(grad if indices is None else gather(grad, indices))
    return grads


def _rebuild(cls: Any, names: tuple[str, ...], by_rule: bool) -> nn.Module:
    """An owner without its content, for pickle and deepcopy."""
    attached = subclass(cls, owner_members(names, by_rule))
    return attached.__new__(attached)
