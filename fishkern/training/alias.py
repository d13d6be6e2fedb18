"""Reading a weight that has leaves: an alias, whose gradient goes to the leaf.

Whoever reads ``module.weight`` in grad mode gets the weight itself, without a copy; of its gradient
the selected entries alone go to the leaf. Functional uses, ties and layers that nobody has heard of
therefore train exactly what they should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fishkern.training.leaves import CHILD, INDICES
from fishkern.training.tracing import is_traced


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
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None, None]:
        """``grad.flatten()[indices]`` for the leaf, nothing for the weight."""
        (indices,) = ctx.saved_tensors
        if grad is None:
            return None, None, None
        flat = grad.is_contiguous()
        selected = grad.view(-1).index_select(0, indices) if flat else grad.take(indices.long())
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


def read_alias(name: str, owner: nn.Module) -> Tensor:
    """A module's weight with leaves, for whoever reads it: the value of a property."""
    weight = owner._parameters[name]
    assert weight is not None
    # functional_call lends a module other tensors for one call.
    if not torch.is_grad_enabled() or not isinstance(weight, nn.Parameter):
        return weight
    leaves: Any = owner._modules[CHILD]
    leaf, indices = leaves._parameters[name], leaves._buffers[name + INDICES]
    # Those of torch.func take ordinary operations.
    if not isinstance(leaf, nn.Parameter) or torch._C._are_functorch_transforms_active():
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
