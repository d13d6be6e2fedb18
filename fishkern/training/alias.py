"""The classes of modules with leaves: reading a weight gives an alias, a rule's forward needs none.

As torch's own parametrizations do, a module's class becomes a subclass in which the weight is a
property. Whoever reads ``module.weight`` in grad mode gets an alias: the weight itself, without a
copy, whose gradient goes to the leaf, at the selected entries alone. Functional uses, ties and
layers that nobody has heard of therefore train exactly what they should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fishkern.interception import (
    ATTACHMENT,
    Rule,
    Site,
    original_class,
    registered,
    run_intercepted,
    subclass,
)
from fishkern.training.inputs import Reader, TrainingCall
from fishkern.training.leaves import CHILD, INDICES


class Alias(torch.autograd.Function):
    """Forward: the weight, detached. Backward: its gradient's selected entries, for the leaf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, leaf: Tensor, indices: Tensor) -> Tensor:
        """The weight itself, without a copy."""
        return weight.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the indices."""
        _, leaf, indices = inputs
        ctx.save_for_backward(indices)
        ctx.dtype = leaf.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None, None]:
        """``grad.flatten()[indices]`` for the leaf, nothing for the weight."""
        (indices,) = ctx.saved_tensors
        if grad is None:
            return None, None, None
        selected = grad.view(-1)[indices] if grad.is_contiguous() else grad.take(indices.long())
        return None, selected.to(ctx.dtype), None


class AliasTensor(Tensor):
    """An alias that passes for the parameter, and passes on what is assigned to its ``data``."""

    _is_param = True  # isinstance(alias, nn.Parameter) holds
    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _fishkern_weight: nn.Parameter

    @property
    def data(self) -> Tensor:
        """That of the weight."""
        return self._fishkern_weight.data

    @data.setter
    def data(self, value: Tensor) -> None:
        weight = self._fishkern_weight
        if value.shape != weight.shape:
            raise RuntimeError(
                f"data of shape {list(value.shape)} for a weight of shape {list(weight.shape)} of "
                f"which train_only trains some entries: resize the model first, or call "
                f"fishkern.attached(model).remove(), resize, and select again"
            )
        weight.data = value


@functools.cache
def owner_members(
    names: tuple[str, ...], by_rule: bool, is_root: bool
) -> Callable[[type[nn.Module]], dict[str, Any]]:
    """The members of an owner's class: its weights ``names`` read as aliases.

    ``by_rule``: it has a rule that covers them, so that its forward needs no alias. ``is_root``: it
    is the attached model itself, whose attachment looks on at calls.
    """

    def members(cls: type[nn.Module]) -> dict[str, Any]:
        def set_attribute(self: nn.Module, name: str, value: Any) -> None:
            # transformers ties weights by assigning one module's weight to another's.
            cls.__setattr__(self, name, getattr(value, "_fishkern_weight", value))

        def reduce(self: nn.Module, protocol: int) -> Any:
            # Before Python 3.11 not every object has it.
            state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
            return _rebuild, (cls, names, by_rule, is_root), state

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            attachment: Any = self.__dict__.get(ATTACHMENT)
            if attachment is None or is_traced():
                return cls.__call__(self, *args, **kwargs)
            return attachment.watched(functools.partial(cls.__call__, self, *args, **kwargs))

        members: dict[str, Any] = {name: property(functools.partial(_read, name)) for name in names}
        members |= {"__setattr__": set_attribute, "__reduce_ex__": reduce}
        if by_rule:
            members["forward"] = _forward
        if is_root:
            members["__call__"] = call
        return members

    return members


def _read(name: str, owner: nn.Module) -> Tensor:
    weight = owner._parameters[name]
    assert weight is not None
    # functional_call lends a module other tensors for one call.
    if not torch.is_grad_enabled() or not isinstance(weight, nn.Parameter):
        return weight
    leaves: Any = owner._modules[CHILD]
    leaf, indices = leaves._parameters[name], leaves._buffers[name + INDICES]
    if not isinstance(leaf, nn.Parameter):
        return _substituted(weight, leaf, indices)
    alias: Tensor = Alias.apply(weight, leaf, indices)  # type: ignore[no-untyped-call]
    if not is_traced() and type(alias) is Tensor:
        leaves.read_whole.add(name)
        alias = alias.as_subclass(AliasTensor)
        alias._fishkern_weight = weight
    return alias


def _substituted(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The weight with other values at the selected entries, as an ordinary operation."""
    flat = weight.detach().reshape(-1)
    return flat.index_put((indices.long(),), values.to(flat.dtype)).view(weight.shape)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module with a rule: its input and grad_out make the selected gradient."""
    cls = original_class(self)
    if is_traced() or len(args) != 1 or kwargs or not torch.is_grad_enabled():
        return cls.forward(self, *args, **kwargs)
    if unpack_dual(args[0]).tangent is not None:  # forward-mode derivatives
        return cls.forward(self, *args)
    rule = registered(cls)
    assert rule is not None
    leaves: Any = self._modules[CHILD]
    params = {name: p for name in rule.params if (p := self._parameters.get(name)) is not None}
    # A weight that is trained whole beside the leaves (unlisted="train") gets its dense gradient.
    anchors = {
        name: leaves._parameters.get(name, param)
        for name, param in params.items()
        if name in leaves._parameters or param.requires_grad
    }
    if not all(isinstance(p, nn.Parameter) for p in (*params.values(), *anchors.values())):
        return cls.forward(self, *args)  # functional_call lends others: an ordinary use
    reader = _reader(self, rule, {name: leaves._buffers.get(name + INDICES) for name in anchors})
    call = TrainingCall(reader, {name: anchor.dtype for name, anchor in anchors.items()})
    site = Site(self, rule, {}, call, keep=call.keep)
    return run_intercepted(site, args[0], list(anchors.values()))


def _reader(module: nn.Module, rule: Rule, indices: dict[str, Tensor | None]) -> Reader:
    """The module as a reader, made in its first forward with these indices."""
    leaves: Any = module._modules[CHILD]
    reader: Reader | None = leaves.reader
    if reader is None or not reader.serves(indices):
        leaves.reader = reader = Reader(module, rule, indices)
    return reader


def is_traced() -> bool:
    """Whether a compiler, make_fx or torch.func looks on, which want operations that they know."""
    active: bool = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
    return active


def _rebuild(cls: Any, names: tuple[str, ...], by_rule: bool, is_root: bool) -> nn.Module:
    """An owner without its content, for pickle and deepcopy."""
    attached = subclass(cls, owner_members(names, by_rule, is_root))
    return attached.__new__(attached)
