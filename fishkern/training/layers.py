"""The forward and backward pass of a module whose weights with leaves are covered by a rule.

Its input and the gradient at its output make the selected gradients alone; the class of such a
module has ``forward_by_rule`` in the place of its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fishkern.interception import Rule, Site, original_class, registered, run_intercepted
from fishkern.training.inputs import Reader, Way
from fishkern.training.leaves import CHILD, INDICES
from fishkern.training.tracing import is_traced


def forward_by_rule(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
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


class TrainingCall:
    """One call of a module in training, as the consumer of what is intercepted.

    Args:
        reader: The module as a reader.
        dtypes: Those of the gradients to be made, by the parameters' local names.
    """

    def __init__(self, reader: Reader, dtypes: Mapping[str, torch.dtype]) -> None:
        self._reader, self._dtypes = reader, dtypes
        self._way: Way | None = None

    def keep(self, x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """What the backward pass needs of the input."""
        tensors, self._way = self._reader.keep(x, dtype)
        return tensors

    def __call__(self, site: Site, kept: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
        """The gradients of the leaves, and of the parameters that are trained whole."""
        way, grads = self._way, []
        assert way is not None
        for name, dtype in self._dtypes.items():
            selection = self._reader.selections[name]
            features = way.features(None if selection is None else selection.columns, kept)
            if selection is None:
                grad = site.rule.param_grad(site.module, name, features, grad_out)
            else:
                grad = site.rule.selected_grad(site.module, name, selection, features, grad_out)
            grads.append(grad.to(dtype))
        return grads
