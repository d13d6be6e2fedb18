"""From parameter groups to launches of the op: what one step gathers, and in which order.

Little is kept between steps, and nothing that a framework may exchange unseen: gradients, states
and their tensors are read anew each time. A plan holds what is costly to find out (roles, indices,
devices) and is made again when a group's parameters or their devices have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor

from fishkern import _ops

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(slots=True, eq=False)
class Batch:
    """The parameters of one group on one device: what one launch updates.

    ``indices`` are as the op wants them (empty where the whole parameter is trained), ``shapes``
    those of the moments (None where the parameter's); ``sharded``: some are DTensors, of which each
    rank updates its own part. ``counts`` is one tensor with a view into it
    for each state's ``step``, so that all are raised in one operation.
    """

    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    sharded: bool = False
    shapes: list[torch.Size | None] = field(default_factory=list)
    counts: Tensor | None = None
    count_views: list[Tensor] = field(default_factory=list)
    lr: tuple[float, Tensor] = (math.nan, torch.empty(0))  # the last one, as the op wants it


@dataclass(slots=True, eq=False)
class Plan:
    """A group's parameters in their order, and the batches they make."""

    params: list[Tensor]
    batches: list[Batch]

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the very same parameters, where they were.

        Devices are compared for one parameter of each batch: models move as a whole, and where one
        does not, the dispatcher refuses tensors of two devices.
        """
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(batch.params[0].device == batch.device for batch in self.batches)
        )


@dataclass(slots=True, eq=False)
class Launch:
    """One call of the op: lists over the parameters that have a gradient."""

    batch: Batch
    params: list[Tensor]
    grads: list[Tensor]
    indices: list[Tensor]
    states: list[dict[str, Any]]
    counts: Tensor | None  # None: the states' steps are not one tensor


def make_plan(params: Sequence[Tensor], indices: Sequence[Tensor | None]) -> Plan:
    """Sort a group's parameters by device.

    Args:
        params: The group's parameters.
        indices: For each the positions to train; None: all.
    """
    batches: dict[torch.device, Batch] = {}
    every: dict[torch.device, Tensor] = {}  # the op's sign for "every entry", once per device
    for param, index in zip(params, indices, strict=True):
        device = param.device
        batch = batches.setdefault(device, Batch(device))
        batch.sharded |= is_sharded(param)
        nothing = every.setdefault(device, torch.empty(0, dtype=torch.int32, device=device))
        batch.params.append(param)
        batch.indices.append(nothing if index is None else index.to(device))
        batch.shapes.append(None if index is None else index.shape)
    return Plan(list(params), list(batches.values()))


def gather(batch: Batch, state: State, group: dict[str, Any]) -> Launch | None:
    """Collect gradients and states, and build the states that are missing.

    Raises:
        RuntimeError: A gradient is sparse.
    """
    params, indices = batch.params, batch.indices
    grads: list[Any] = [param.grad for param in params]
    states: list[Any] = [state.get(param) for param in params]
    if not all(states):
        states = _build_states(batch, state, group)
        if _only_builds(group, grads):
            return None
    counts = None
    if all(map(is_not, grads, repeat(None))):
        counts = _packed_counts(batch, states)
    else:
        some = [i for i, grad in enumerate(grads) if grad is not None]
        if not some:
            return None
        params, indices = [params[i] for i in some], [indices[i] for i in some]
        grads, states = [grads[i] for i in some], [states[i] for i in some]
    if [grad.layout for grad in grads].count(torch.strided) != len(grads):
        odd = next(grad for grad in grads if grad.layout is not torch.strided)
        raise RuntimeError(
            f"a gradient of shape {list(odd.shape)} is {odd.layout}, but sparse gradients are not "
            f"supported: make it dense, for an embedding with sparse=False"
        )
    return Launch(batch, params, grads, indices, states, counts)


def run(
    launch: Launch, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Raise the step counts and launch the op.

    Args:
        launch: What ``gather`` collected.
        group: The options.
        grad_scale: Gradients are divided by it first.
        found_inf: Where not zero, nothing changes; None if that has been decided before.
    """
    batch, states = launch.batch, launch.states
    beta1, beta2 = group["betas"]
    counts = [entry["step"] for entry in states] if launch.counts is None else [launch.counts]
    torch._foreach_add_(counts, 1)
    lists = [
        launch.params,
        launch.grads,
        launch.indices,
        [entry["exp_avg"] for entry in states],
        [entry["exp_avg_sq"] for entry in states],
        [entry["max_exp_avg_sq"] for entry in states] if group["amsgrad"] else [],
        [],
    ]
    if batch.sharded:
        lists = [[t.to_local() if is_sharded(t) else t for t in tensors] for tensors in lists]
    try:
        _op()(
            *lists,
            torch.stack(counts) if launch.counts is None else launch.counts,
            _lr(batch, group["lr"]),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            None if grad_scale is None else grad_scale.to(batch.device),
            None if found_inf is None else found_inf.to(batch.device),
        )
    except BaseException:
        torch._foreach_sub_(counts, 1)
        raise
    if found_inf is not None:
        torch._foreach_sub_(counts, [(found_inf != 0).to(counts[0])] * len(counts))


def _op() -> Callable[..., None]:
    """The op: through the dispatcher only where a compiler is looking, since that takes time."""
    if torch.compiler.is_compiling():
        return torch.ops.fishkern.masked_adamw_
    return _ops.masked_adamw_


def _lr(batch: Batch, lr: float | Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        return lr
    if batch.lr[0] != lr:
        batch.lr = (lr, torch.tensor(lr, dtype=torch.float64))
    return batch.lr[1]


def scaling(optimizer: torch.optim.Optimizer) -> tuple[Tensor | None, Tensor | None] | None:
    """What a GradScaler asks for: (grad_scale, found_inf); None to skip the step.

    The scaler sets both as attributes around ``step()``. Unless everything is capturable the
    verdict is read here once, so that the step counts may stay on the host.

    Raises:
        RuntimeError: The scaler has looked at no gradient.
    """
    grad_scale, found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
    if found_inf is None:
        return grad_scale, None
    if not isinstance(found_inf, Tensor):
        raise RuntimeError(
            f"the GradScaler made no inf checks (found_inf is {found_inf!r}, not a tensor): no "
            f"parameter of this optimizer has a gradient; call backward() on the scaled loss "
            f"before scaler.step(optimizer), and unfreeze what is to be trained"
        )
    if all(group["capturable"] for group in optimizer.param_groups):
        return grad_scale, found_inf
    return None if found_inf.item() else (grad_scale, None)


def _only_builds(group: dict[str, Any], grads: list[Any]) -> bool:
    """Whether this first step has lr = 0 and zero gradients: it moves nothing, so it is no step.

    ``torch.distributed.checkpoint`` calls it to have states to load into. Counted, it would spoil
    the bias corrections of a run that then starts anew.
    """
    if float(group["lr"]) != 0 or any(
        g is not None and g.layout is not torch.strided for g in grads
    ):
        return False
    found = [grad.any() for grad in grads if grad is not None]
    return not any(f.full_tensor() if is_sharded(f) else f for f in found)


def _build_states(batch: Batch, state: State, group: dict[str, Any]) -> list[Any]:
    """Zero moments for each parameter without a state, also for one that has no gradient yet.

    Checkpoint formats want an entry for every trainable parameter from the first step on; a frozen
    parameter that is given without a mask gets one when it has a gradient, as in torch.
    """
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    for param, shape in zip(batch.params, batch.shapes, strict=True):
        wanted = shape is not None or param.requires_grad or param.grad is not None
        if state.get(param) or not wanted:
            continue
        counter_device = batch.device if group["capturable"] else "cpu"
        entry: dict[str, Any] = {
            "step": torch.zeros((), dtype=torch.float32, device=counter_device)
        }
        dtype = moment_dtype(param)
        for key in keys:
            if is_sharded(param):
                entry[key] = torch.zeros_like(param, dtype=dtype)
                continue
            # Contiguous whatever the parameter's strides: entry j belongs to flat position j.
            entry[key] = torch.zeros(
                param.shape if shape is None else shape, dtype=dtype, device=batch.device
            )
        state[param] = entry
    return [state.get(param) for param in batch.params]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked by attribute, since importing DTensor takes long."""
    return hasattr(tensor, "to_local")


def moment_dtype(param: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter."""
    return torch.promote_types(param.dtype, torch.float32)


def _packed_counts(batch: Batch, states: list[dict[str, Any]]) -> Tensor:
    """The step counts as one tensor, of which each state's ``step`` is a view."""
    steps = [entry["step"] for entry in states]
    counts = batch.counts
    if (
        counts is None
        or not all(map(is_, steps, batch.count_views))
        or steps[0].data_ptr() != counts.data_ptr()  # moved by `step.data = ...`
    ):
        counts = torch.stack([step.to(steps[0].device, torch.float32) for step in steps])
        batch.counts, batch.count_views = counts, list(counts.unbind())
        for entry, view in zip(states, batch.count_views, strict=True):
            entry["step"] = view
    return counts
