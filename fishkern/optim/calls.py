"""The calls of the op: packed state in one tensor, lists of tensors, or sorted by step counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fishkern import _ops
from fishkern.backends.packed import raised
from fishkern.optim.cohorts import Sorting
from fishkern.optim.plans import Batch, Call, Packed
from fishkern.optim.quantized import SCALES
from fishkern.optim.states import AVERAGES, MOMENTS
from fishkern.tensors import is_sharded
from fishkern.training.leaves import mark_settled


def run_call(
    call: Call, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Call the op, which or around which the step counts are raised.

    Args:
        call: What ``make_call`` collected.
        group: The options.
        grad_scale: Gradients are divided by it first.
        found_inf: Where not zero, nothing changes; None if that has been decided before.
    """
    batch = call.batch
    beta1, beta2 = group["betas"]
    options = (
        _lr(batch, group["lr"], group["capturable"]),
        float(beta1),
        float(beta2),
        group["eps"],
        group["weight_decay"],
        group["maximize"],
        None if grad_scale is None else grad_scale.to(batch.device),
        None if found_inf is None else found_inf.to(batch.device),
    )
    if batch.sorting is not None:
        _run_sorted(call, batch.sorting, group["amsgrad"], options)
    elif call.some is None and batch.layout is not None:
        _run_packed(call, group["amsgrad"], options)
    else:
        _run_lists(call, group["amsgrad"], options)
    # The op is called below autograd, which has to learn that saved weights have changed.
    torch.autograd.graph.increment_version(_chosen(call, batch.targets))
    if batch.settled is not None:
        masters = _chosen(call, batch.masters)
        if call.some is None:
            torch.cat(masters, out=batch.settled.tensor)
        else:
            torch._foreach_copy_(_chosen(call, batch.settled.views), masters)
        torch.autograd.graph.increment_version(masters)
        if batch.device.type == "cuda":
            mark_settled(_chosen(call, batch.params))


def _run_packed(call: Call, amsgrad: bool, options: tuple[Any, ...]) -> None:
    batch, steps = call.batch, _packed(call, "step")
    exp_avg, exp_avg_sq = _packed(call, "exp_avg"), _packed(call, "exp_avg_sq")
    assert batch.layout is not None
    offsets, indices = batch.layout
    maxima = _packed(call, "max_exp_avg_sq") if amsgrad else None
    _ops.masked_adamw_packed_(  # without the dispatcher, which takes time
        *(batch.targets, call.grads, offsets, indices),
        *(exp_avg, exp_avg_sq, maxima, None, steps),
        *options,
    )


def _run_lists(call: Call, amsgrad: bool, options: tuple[Any, ...]) -> None:
    batch, values = call.batch, call.values
    quantized = batch.state_dtype is not torch.float32
    more = [values.get(scale, []) for scale in SCALES.values()]
    lists: list[list[Any]] = [
        _chosen(call, batch.targets),
        call.grads,
        _chosen(call, batch.indices),
        values["exp_avg"],
        values["exp_avg_sq"],
        *(more if quantized else [values["max_exp_avg_sq"] if amsgrad else []]),
        _chosen(call, batch.masters),
    ]
    if batch.sharded:
        lists = [[t.to_local() if is_sharded(t) else t for t in tensors] for tensors in lists]
    op = _ops.masked_adamw_quantized_ if quantized else _ops.masked_adamw_
    before = _packed(call, "step") if call.some is None else torch.stack(values["step"])
    steps = raised(before, found_inf=options[-1])
    op(*lists, steps, *options)
    if call.some is None:
        before.copy_(steps)
    else:
        torch._foreach_copy_(values["step"], steps.unbind())


def _run_sorted(call: Call, sorting: Sorting, amsgrad: bool, options: tuple[Any, ...]) -> None:
    """One call for several step counts: all entries sorted by them, and put back."""
    batch, steps = call.batch, _packed(call, "step")
    states = [_packed(call, kind) for kind in (MOMENTS if amsgrad else AVERAGES)]
    counts, chosen = steps, None
    by_param: Sequence[Any] = call.grads
    if call.some is not None:
        there = dict(zip(call.some, call.grads, strict=True))
        by_param = [there.get(i) for i in range(len(batch.params))]
        chosen = [j for j, owner in enumerate(sorting.owners) if owner in there]
        sorting, counts = sorting.only(chosen), steps[chosen]
    if batch.masters:  # leaves, whose gradients are of the entries alone
        states.append(torch.cat(batch.masters))
        every = [m if g is None else g for g, m in zip(by_param, batch.masters, strict=True)]
        grads = list(torch.cat(every)[sorting.order].split(sorting.sizes))
    else:
        grads = [by_param[i] for i in sorting.owners]
    values = [tensor[sorting.order] for tensor in states]
    _ops.masked_adamw_packed_(
        *([batch.targets[i] for i in sorting.owners], grads, sorting.offsets, sorting.indices),
        *(values[0], values[1], values[2] if amsgrad else None),
        *(values[-1] if batch.masters else None, counts),
        *options,
    )
    if chosen is not None:
        steps[chosen] = counts
    for tensor, value in zip(states, values, strict=True):
        tensor[sorting.order] = value
    if batch.masters:
        torch._foreach_copy_(batch.masters, states[-1].split([m.numel() for m in batch.masters]))


def _chosen(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """Those of the batch's tensors that the call is for."""
    some = call.some
    return tensors if some is None or not tensors else [tensors[i] for i in some]


def _packed(call: Call, key: str) -> Tensor:
    """One kind of state of the whole batch in one tensor; packed now where it is not."""
    values = call.values[key]
    held = call.batch.packed.get(key)
    if held is not None and held.holds(values):
        return held.tensor
    tensor = torch.cat([value.reshape(-1).to(values[0].device) for value in values])
    parts = tensor.split([value.numel() for value in values])
    views = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
    for entry, view in zip(call.states, views, strict=True):
        entry[key] = view
    call.batch.packed[key] = Packed(tensor, views)
    return tensor


def _lr(batch: Batch, lr: float | Tensor, capturable: bool) -> Tensor:
    if isinstance(lr, Tensor):
        return lr
    if capturable:  # filled on the device: a graph could not copy it there
        return torch.full((), lr, dtype=torch.float64, device=batch.device)
    held = batch.lr
    if held is None or held[0] != lr:
        held = batch.lr = (lr, torch.tensor(lr, dtype=torch.float64, device="cpu"))
    return held[1]
