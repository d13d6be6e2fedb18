"""From parameter groups to what one step hands to the op, and in which order.

Little is kept between steps, and nothing that a framework may exchange unseen: gradients are read
anew each time, states and their tensors when somebody has written to them (``states.py``). A plan
holds what is costly to find out (roles, indices, devices) and is made again when a group's
parameters or their devices have changed.

State lies packed: one tensor per kind (steps, first and second moments) for all parameters of a
batch, with a view into it in each parameter's state, so that one call reads two lists - parameters
and gradients - and not seven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishkern.optim.cohorts import COHORTS, Sorting
from fishkern.optim.quantized import scales_of, zero_scales
from fishkern.optim.states import AVERAGES, MOMENTS, Entry, Memo, State, States
from fishkern.tensors import is_sharded, wide_dtype
from fishkern.training import leaves


@dataclass(slots=True, eq=False)
class Packed:
    """One kind of values of a whole batch, and the views into it that the parameters have."""

    tensor: Tensor
    views: list[Tensor]
    first: int = field(init=False)  # of those that are not empty

    def __post_init__(self) -> None:
        self.first = next((i for i, view in enumerate(self.views) if view.numel()), 0)

    def holds(self, values: list[Tensor]) -> bool:
        """Whether these are the very same views (and not moved by ``value.data = ...``)."""
        if values is not self.views:
            if not all(map(is_, values, self.views)):
                return False
            self.views = values  # so that the same list is not looked through again
        return values[self.first].data_ptr() == self.tensor.data_ptr()


class Found(NamedTuple):
    """The states of those parameters of a batch that a step is for, and what they hold by kind."""

    owner: State
    kinds: Sequence[str]
    some: list[int] | None
    states: list[dict[str, Any]]
    values: dict[str, list[Tensor]]

    def holds(self, state: State, kinds: Sequence[str], some: list[int] | None) -> bool:
        """Whether these are asked for."""
        return self.owner is state and self.kinds == kinds and self.some == some


@dataclass(slots=True, eq=False)
class Batch:
    """Parameters of one group that one call can update: of one device, with moments of one dtype.

    ``indices`` are as the op wants them (empty where the whole parameter is trained), ``shapes``
    those of the moments (None: the parameter's). ``layout`` holds the packed offsets and indices,
    into which the single ``indices`` are views. ``scales`` are the names of those that the states
    have, where their moments are in 8 bits. ``targets`` are what the op writes: the parameters
    themselves, or the dense weights of leaves, whose float32 masters the leaves then are.
    """

    device: torch.device
    sharded: bool  # DTensors, of which each rank updates its own part
    state_dtype: torch.dtype = torch.float32  # float64 moments of float64 parameters are meant too
    scales: tuple[str, ...] = ()
    params: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)  # empty, or one for each parameter
    settled: Packed | None = None  # of the masters: see leaves.Home
    sorting: Sorting | None = None  # of entries with several step counts, after set_mask
    indices: list[Tensor] = field(default_factory=list)
    shapes: list[torch.Size | None] = field(default_factory=list)
    layout: tuple[Tensor, Tensor] | None = None  # None: for those that take lists
    packed: dict[str, Packed] = field(default_factory=dict)
    found: Memo = field(default_factory=Memo)  # a Found: by the last step, until one is written to
    lr: tuple[float, Tensor] | None = None  # the last one, and as the op wants it


@dataclass(slots=True, eq=False)
class Plan:
    """A group's parameters in their order, and the batches they make."""

    params: list[Tensor]
    batches: list[Batch]
    generation: int  # which state of the leaves' homes it was made for

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the very same parameters, where they were.

        Devices are compared for one parameter of each batch: models move as a whole, and where one
        does not, the dispatcher refuses tensors of two devices.
        """
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(batch.params[0].device == batch.device for batch in self.batches)
            and self.generation == leaves.generation()
        )

    def packed_indices(self) -> dict[int, Tensor]:
        """By the parameters' ids the indices that are views into a batch's packed ones."""
        return {
            id(param): index
            for batch in self.batches
            if batch.layout is not None
            for param, index in zip(batch.params, batch.indices, strict=True)
        }


@dataclass(slots=True, eq=False)
class Call:
    """One call of the op: for the whole batch, or for those of its parameters in ``some``."""

    batch: Batch
    grads: list[Tensor]
    states: list[dict[str, Any]]
    values: dict[str, list[Tensor]]  # what the states hold, by kind
    some: list[int] | None


def refuse_capture(params: Sequence[Tensor]) -> None:
    """For what the first step with these parameters builds.

    Raises:
        RuntimeError: A CUDA graph is being captured, each replay of which would build it again.
    """
    if params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph captures the first step, which lays out the mask and makes the moments: "
            "each replay would set them back to zero. Call step() once before capturing"
        )


def make_plan(
    params: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    state: State,
    state_dtype: torch.dtype,
) -> Plan:
    """Sort a group's parameters into batches.

    Args:
        params: The group's parameters.
        indices: For each the positions to train; None: all.
        state: Tells which parameters have entries with several step counts.
        state_dtype: What moments are kept in.
    """
    scales = scales_of(state_dtype)
    batches: dict[Any, Batch] = {}
    every: dict[torch.device, Tensor] = {}  # the op's sign for "every entry", once per device
    for param, index in zip(params, indices, strict=True):
        device, sharded = param.device, is_sharded(param)
        home = None if sharded else leaves.home_of(param)
        wide = index is not None and index.dtype == torch.int64  # packed indices are of one dtype
        several = COHORTS in state.get(param, ())
        held = None if home is None else home.weight.dtype  # of leaves' packed copies
        key = (device, sharded, wide_dtype(param), held, wide, several)
        batch = batches.setdefault(key, Batch(device, sharded, state_dtype, scales))
        nothing = every.setdefault(device, torch.empty(0, dtype=torch.int32, device=device))
        batch.params.append(param)
        batch.shapes.append(None if index is None else index.shape)
        if home is not None:
            batch.targets.append(home.weight)
            batch.masters.append(param.detach())
            batch.indices.append(home.indices)
        else:
            batch.targets.append(param)
            batch.indices.append(nothing if index is None else index.to(device))
    for batch in batches.values():
        if COHORTS in state.get(batch.params[0], ()):
            _sort(batch, state)
        # Leaves keep their own memory: they are parameters, which others may exchange.
        elif not batch.sharded and not batch.masters and state_dtype is torch.float32:
            _lay_out(batch)
        if batch.masters:
            batch.settled = Packed(*leaves.pack_settled(batch.params))
    return Plan(list(params), list(batches.values()), leaves.generation())


def make_call(batch: Batch, state: State, group: dict[str, Any]) -> Call | None:
    """Collect gradients and states, and build the states that are missing.

    Raises:
        RuntimeError: A gradient is sparse, or a state lacks something.
    """
    grads: list[Any] = [param.grad for param in batch.params]
    some = None
    if not all(map(is_not, grads, repeat(None))):
        some = [i for i, grad in enumerate(grads) if grad is not None]
    kinds = ("step", *(MOMENTS if group["amsgrad"] else AVERAGES), *batch.scales)
    found: Found | None = batch.found.value
    if found is not None and not found.holds(state, kinds, some):
        found = None
    if found is None and not all(map(state.get, batch.params)):
        _build_states(batch, state, group)
        if _only_builds(group, grads):
            return None
    if some is not None:
        if not some:
            return None
        grads = [grads[i] for i in some]
    if [grad.layout for grad in grads].count(torch.strided) != len(grads):
        odd = next(grad for grad in grads if grad.layout is not torch.strided)
        raise RuntimeError(
            f"a gradient of shape {list(odd.shape)} is {odd.layout}, but sparse gradients are not "
            f"supported: make it dense, for an embedding with sparse=False"
        )
    if found is None:
        found = _find(batch, state, kinds, some)
    return Call(batch, grads, found.states, found.values, some)


def _find(batch: Batch, state: State, kinds: Sequence[str], some: list[int] | None) -> Found:
    """The states, in the parameters' order."""
    # Of those with several step counts all are sorted, and put back.
    every = some is None or batch.sorting is not None
    states = [state[batch.params[i]] for i in (range(len(batch.params)) if every else some or ())]
    try:
        values = {kind: [entry[kind] for entry in states] for kind in kinds}
    except KeyError as error:
        raise RuntimeError(
            f"the optimizer's state has no {error} for one of its parameters: amsgrad cannot be "
            f"switched on after the first step, and a checkpoint has to be one of AdamW; build the "
            f"optimizer anew with the options it is to have"
        ) from None
    found = Found(state, kinds, some, states, values)
    # One that is missing is looked for again; what is no Entry, or in no States, tells nothing.
    entries = map(state.get, batch.params)
    if type(state) is States and all(type(entry) is Entry and entry for entry in entries):
        batch.found.keep(found)
    return found


def _lay_out(batch: Batch) -> None:
    """Where each parameter's entries are in the packed state, and all indices in one tensor."""
    counts = [
        param.numel() if shape is None else shape.numel()
        for param, shape in zip(batch.params, batch.shapes, strict=True)
    ]
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int64, device="cpu")
    stored = [index for index in batch.indices if index.numel()]
    indices = torch.cat(stored) if stored else batch.indices[0]
    # Held once: the single lists become views.
    parts = iter(indices.split([index.numel() for index in stored]))
    batch.indices = [next(parts) if index.numel() else index for index in batch.indices]
    batch.layout = (offsets, indices)


def _sort(batch: Batch, state: State) -> None:
    """For the op the entries stand together by their step counts."""
    positions = [
        index
        if index.numel()
        else torch.arange(param.numel(), dtype=torch.int32, device=batch.device)
        for param, index in zip(batch.params, batch.indices, strict=True)
    ]
    batch.sorting = Sorting(positions, [state[param][COHORTS] for param in batch.params])


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


def _build_states(batch: Batch, state: State, group: dict[str, Any]) -> None:
    """Zero moments for each parameter without a state, also for one that has no gradient yet.

    Checkpoint formats want an entry for every trainable parameter from the first step on; a frozen
    parameter that is given without a mask gets one when it has a gradient, as in torch.
    """
    refuse_capture(batch.params)
    keys = MOMENTS if group["amsgrad"] else AVERAGES
    for param, shape in zip(batch.params, batch.shapes, strict=True):
        wanted = shape is not None or param.requires_grad or param.grad is not None
        if state.get(param) or not wanted:
            continue
        counter_device = batch.device if group["capturable"] else "cpu"
        entry = Entry(step=torch.zeros((), dtype=torch.float32, device=counter_device))
        narrow = batch.state_dtype is not torch.float32
        dtype = batch.state_dtype if narrow else wide_dtype(param)
        for key in keys:
            if is_sharded(param):
                entry[key] = torch.zeros_like(param, dtype=dtype)
                continue
            # Contiguous whatever the parameter's strides: entry j belongs to flat position j.
            entry[key] = torch.zeros(
                param.shape if shape is None else shape, dtype=dtype, device=batch.device
            )
        for moment, scale in zip(keys, batch.scales, strict=False):
            entry[scale] = zero_scales(entry[moment])
        state[param] = entry


def check_leaves_on(plans: Sequence[Plan]) -> None:
    """Refuse a step in which no leaf can be trained, though there are leaves.

    Raises:
        RuntimeError: Says how many there are, and who freezes leaves.
    """
    held = [
        leaf for plan in plans for batch in plan.batches if batch.masters for leaf in batch.params
    ]
    if held and not any(leaf.requires_grad for leaf in held):
        raise RuntimeError(
            f"all {len(held)} leaves of train_only are frozen (requires_grad=False), so that this "
            f"step would train no selected entry: PEFT's set_adapter, disable_adapter and "
            f"load_adapter freeze the adapters that they switch off, and requires_grad_(False) on "
            f"a module freezes its leaves; call model.set_adapter(name) with the adapter of the "
            f"mask, or requires_grad_(True) on handle.parameters()"
        )
