"""AdamW on selected entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_own_memory

WIDE = (torch.float32, torch.float64)  # what moments and masters are in


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[Tensor | float] | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_exp_avg_sqs: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on the selected entries of many tensors, in one call, in place.

    With p the selected values and g the selected gradient of tensor i, in float32, or in float64
    for float64 parameters::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^steps[i]) m / (sqrt(v) / sqrt(1 - beta2^steps[i]) + eps)

    (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2; the
    arithmetic of ``torch.optim.AdamW``.) Parameters are read and written at ``indices`` only:
    outside, not one bit changes.

    Args:
        params: The parameters, any shape, strides and floating dtype.
        grads: For each its gradient, of the parameter's shape, or ``[k_i]``, already selected.
        indices: For each the selected flat positions ``[k_i]``, int32 or int64, ascending. An
            empty list beside moments of the parameter's size selects every entry.
        exp_avgs: First moments ``[k_i]``, float32; float64 too, which is for float64 parameters.
        exp_avg_sqs: Second moments ``[k_i]``, of the same dtype.
        steps: The number of this step for each tensor, counted from 1; a list of numbers or 0-d
            tensors, or one 1-D float32 tensor.
        lr: Learning rate, a number or a 0-d tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, of the selected entries only.
        max_exp_avg_sqs: For AMSGrad: running maxima of the second moments, ``[k_i]`` each.
        masters: Selected values in the moments' dtype, ``[k_i]`` each (an empty tensor where a
            parameter has none): they are updated, and the parameters get their rounding.
        maximize: Ascend instead of descend.
        grad_scale: 0-d float32: gradients are divided by it first.
        found_inf: 0-d float32: nothing at all is changed if it is not zero.

    Raises:
        ValueError: Lists of different lengths, shapes that do not fit, an expanded parameter, or
            indices that are not ascending or out of range. Those on a GPU, or inside
            ``torch.compile``, are not read.
        TypeError: A dtype that is not the one named above.

    Example:
        >>> import torch
        >>> param, grad = torch.ones(2, 3), torch.ones(2, 3)
        >>> index, m, v = torch.tensor([1, 5]), torch.zeros(2), torch.zeros(2)
        >>> masked_adamw_([param], [grad], [index], [m], [v], steps=[1], lr=0.1,
        ...               betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        >>> param
        tensor([[1.0000, 0.9000, 1.0000],
                [1.0000, 1.0000, 0.9000]])
    """
    lists = {"grads": grads, "indices": indices, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"max_exp_avg_sqs": max_exp_avg_sqs} if len(max_exp_avg_sqs) else {}
    lists |= {"masters": masters} if len(masters) else {}
    check_lengths(len(params), {**lists, "steps": steps})
    for i, param in enumerate(params):
        check_entry(i, param, {name: tensors[i] for name, tensors in lists.items()})
    if not params:
        return
    torch.ops.fishkern.masked_adamw_(
        list(params),
        list(grads),
        list(indices),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(masters),
        step_vector(steps),
        lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu"),
        *betas,
        eps,
        weight_decay,
        maximize,
        grad_scale,
        found_inf,
    )


def step_vector(steps: Sequence[Tensor | float] | Tensor) -> Tensor:
    """One float32 tensor of steps, where they are; on the host if they are numbers."""
    if isinstance(steps, Tensor):
        return steps.to(torch.float32)
    if all(isinstance(step, Tensor) for step in steps):
        return torch.stack([step.to(torch.float32) for step in steps if isinstance(step, Tensor)])
    return torch.tensor([float(step) for step in steps], dtype=torch.float32, device="cpu")


def check_lengths(count: int, lists: Mapping[str, Sequence[Tensor | float] | Tensor]) -> None:
    """Check that there is one entry for each of the parameters in every list."""
    for name, entries in lists.items():
        if len(entries) != count:
            raise ValueError(f"{name} has {len(entries)} entries, params {count}")


def check_entry(
    i: int, param: Tensor, entry: dict[str, Tensor], moments_in: tuple[torch.dtype, ...] = WIDE
) -> None:
    """Check the tensors that belong to ``params[i]``; moments have one of these dtypes."""
    if not param.is_floating_point():
        raise TypeError(f"params[{i}] has dtype {param.dtype}: pass a floating-point tensor")
    check_own_memory(f"params[{i}]", param)
    index, moments = entry["indices"], entry["exp_avgs"].numel()
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices[{i}] has dtype {index.dtype}: pass int32 or int64")
    selected = index.numel()
    _check_positions(i, index, param.numel())
    if selected == 0 and moments == param.numel():
        selected = moments  # every entry
    grad = entry["grads"]
    if grad.shape != param.shape and tuple(grad.shape) != (selected,):
        raise ValueError(
            f"grads[{i}] has shape {list(grad.shape)}: pass the parameter's "
            f"{list(param.shape)} or the selected [{selected}]"
        )
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters"):
        tensor = entry.get(name)
        if tensor is None or (name == "masters" and tensor.numel() == 0):
            continue
        dtypes = WIDE if name == "masters" else moments_in
        if tensor.dtype not in dtypes:
            known = "float32" if dtypes is WIDE else " or ".join(map(str, dtypes))
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}: pass {known}")
        if tensor.numel() != selected:
            raise ValueError(f"{name}[{i}] has {tensor.numel()} entries, selected are {selected}")


def _check_positions(i: int, index: Tensor, numel: int) -> None:
    """Refuse positions that a kernel would write outside the parameter, or from two threads."""
    if index.numel() == 0 or index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if index.dim() != 1:
        raise ValueError(f"indices[{i}] has shape {list(index.shape)}: pass [k]")
    if not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"indices[{i}] is not strictly ascending: sort it, each position once")
    for value in (int(index[0]), int(index[-1])):
        if not 0 <= value < numel:
            raise ValueError(f"indices[{i}] holds {value}, but params[{i}] has {numel} entries")
