"""The direct door to the ops: checked, documented functions over tensors.

Each is also ``torch.ops.fishkern.<name>``, with a fake kernel, so that it can stand inside
``torch.compile(fullgraph=True)``. A name that ends in an underscore changes its arguments in
place and returns None. All accumulation is in float32 (in float64 where the accumulator is
float64, which the plain-torch backend accepts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)

__all__ = ["linear_fisher_", "masked_adamw_", "topk_indices"]


def linear_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Add a linear layer's per-sample squared weight gradients to ``fisher``, in place.

    For samples n, tokens t, input features i and output features o::

        G[n]    = sum_t grad_out[n, t] x[n, t]^T                      [O, I]
        fisher += sum_n G[n]^2                                        squared after the sum over t
        bias_fisher      += sum_n (sum_t grad_out[n, t])^2
        sample_scores[n] += sum_{o,i in mask} G[n]^2

    This is the diagonal of the empirical Fisher information, up to the factor 1/N, if
    ``grad_out`` is the gradient of the sum of the samples' own losses (Sung et al., "Training
    Neural Networks with Fixed Sparse Masks", 2021, section 3.1).

    Args:
        fisher: Accumulator, float32 ``[O, I]``.
        x: The layer's input ``[N, *, I]``, any floating dtype and strides. All dimensions between
            the first and the last are tokens; there may be none.
        grad_out: Gradient at the layer's output ``[N, *, O]``, as ``x``.
        bias_fisher: Accumulator for the bias, float32 ``[O]``.
        sample_scores: Accumulator per sample, float32 ``[N]``.
        mask: Which weights count in ``sample_scores``, bool ``[O, I]``; None: all.

    Raises:
        ValueError: Shapes do not fit together.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> x, grad_out = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
        >>> fisher = torch.zeros(2, 3)
        >>> linear_fisher_(fisher, x, grad_out)
        >>> per_sample = torch.einsum("nto,nti->noi", grad_out, x)
        >>> torch.testing.assert_close(fisher, per_sample.square().sum(0))
    """
    if x.dim() < 2 or grad_out.dim() != x.dim() or x.shape[:-1] != grad_out.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)} and grad_out {list(grad_out.shape)} must be [N, *, I] and "
            f"[N, *, O] with the same leading dimensions"
        )
    shape = (grad_out.shape[-1], x.shape[-1])
    _check_accumulator("fisher", fisher, shape)
    for name, tensor in (("x", x), ("grad_out", grad_out)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: pass a floating-point tensor")
    if bias_fisher is not None:
        _check_accumulator("bias_fisher", bias_fisher, shape[:1])
    if sample_scores is not None:
        _check_accumulator("sample_scores", sample_scores, (x.shape[0],))
    if mask is not None:
        if sample_scores is None:
            raise ValueError("mask restricts sample_scores, which is None: pass both or neither")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}: pass a bool tensor")
        if tuple(mask.shape) != shape:
            raise ValueError(f"mask has shape {list(mask.shape)}, the weight {list(shape)}")
    torch.ops.fishkern.linear_fisher_(
        fisher, x, grad_out, bias_fisher=bias_fisher, sample_scores=sample_scores, mask=mask
    )


def topk_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The positions of the k largest scores over a whole list of tensors, exactly k of them.

    The scores are neither copied nor sorted. Ties go to the earlier tensor and, within a tensor,
    to the lower position, so that the result does not depend on the device or thread count.

    Args:
        scores: float32 tensors of any shape, without NaN.
        k: How many, from 0 to the number of all scores.

    Returns:
        For each tensor the flat positions selected in it: int64, 1-D, ascending, maybe empty.

    Raises:
        ValueError: ``k`` is negative or larger than the number of scores.
        TypeError: A tensor is not float32.

    Example:
        >>> import torch
        >>> topk_indices([torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 2.0]])], 3)
        [tensor([0, 1]), tensor([1])]
    """
    total = sum(s.numel() for s in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k is {k}, but there are {total} scores: choose k from 0 to {total}")
    for i, score in enumerate(scores):
        if score.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"scores[{i}] has dtype {score.dtype}: pass float32")
    indices: list[Tensor] = torch.ops.fishkern.topk_indices(list(scores), k)
    return indices


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

    With p the selected values and g the selected gradient of tensor i, in float32::

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
        exp_avgs: First moments ``[k_i]``, float32.
        exp_avg_sqs: Second moments ``[k_i]``, float32.
        steps: The number of this step for each tensor, counted from 1; a list of numbers or 0-d
            tensors, or one 1-D float32 tensor.
        lr: Learning rate, a number or a 0-d tensor.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, of the selected entries only.
        max_exp_avg_sqs: For AMSGrad: running maxima of the second moments, ``[k_i]`` each.
        masters: Selected values in float32, ``[k_i]`` each (an empty tensor where a parameter has
            none): they are updated, and the parameters get their rounding.
        maximize: Ascend instead of descend.
        grad_scale: 0-d float32: gradients are divided by it first.
        found_inf: 0-d float32: nothing at all is changed if it is not zero.

    Raises:
        ValueError: Lists of different lengths, shapes that do not fit, or indices that are not
            ascending or out of range. Those on a GPU, or inside ``torch.compile``, are not read.
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
    for name, tensors in {**lists, "steps": steps}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} entries, params {len(params)}")
    for i, param in enumerate(params):
        _check_entry(i, param, {name: tensors[i] for name, tensors in lists.items()})
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
        _step_vector(steps, params[0].device),
        lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu"),
        *betas,
        eps,
        weight_decay,
        maximize,
        grad_scale,
        found_inf,
    )


def _step_vector(steps: Sequence[Tensor | float] | Tensor, device: torch.device) -> Tensor:
    """One float32 tensor of steps; on the parameters' device only if the steps were there."""
    if isinstance(steps, Tensor):
        return steps.to(torch.float32)
    if all(isinstance(step, Tensor) for step in steps):
        return torch.stack([step.to(torch.float32) for step in steps if isinstance(step, Tensor)])
    return torch.tensor([float(step) for step in steps], dtype=torch.float32, device="cpu")


def _check_accumulator(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {tensor.dtype}: accumulate in float32")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def _check_entry(i: int, param: Tensor, entry: dict[str, Tensor]) -> None:
    """Check the tensors that belong to ``params[i]``."""
    if not param.is_floating_point():
        raise TypeError(f"params[{i}] has dtype {param.dtype}: pass a floating-point tensor")
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
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}: pass float32")
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
