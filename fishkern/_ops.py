"""Table of contents: the schema of every op, its fake, and its registration.

Each op is ``torch.ops.fishkern.<name>``; the dispatcher's entry asks ``_dispatch`` for a
backend each time it runs, so that the choice also holds inside a compiled graph. Arguments are
not checked here: ``fishkern.functional`` is the checked door.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fishkern._dispatch import choose

_library = torch.library.Library("fishkern", "DEF")

SCHEMAS = {
    "linear_fisher_": (
        "(Tensor(a!) fisher, Tensor x, Tensor grad_out, *, Tensor(b!)? bias_fisher=None, "
        "Tensor(c!)? sample_scores=None, Tensor? mask=None) -> ()"
    ),
    "embedding_fisher_": (
        "(Tensor(a!) fisher, Tensor ids, Tensor grad_out, *, int? padding_idx=None, "
        "Tensor(b!)? sample_scores=None, Tensor? mask=None) -> ()"
    ),
    "norm_fisher_": (
        "(Tensor(a!)? weight_fisher, Tensor(b!)? bias_fisher, Tensor? x_hat, Tensor grad_out, *, "
        "Tensor(c!)? sample_scores=None, Tensor? weight_mask=None, Tensor? bias_mask=None) -> ()"
    ),
    "conv_fisher_": (
        "(Tensor(a!) fisher, Tensor x, Tensor grad_out, *, Tensor(b!)? bias_fisher=None, "
        "int[] stride, int[] padding, int[] dilation, int groups, "
        "Tensor(c!)? sample_scores=None, Tensor? mask=None) -> ()"
    ),
    # indices: flat positions in the matrix [rows, columns]. rows or columns of None: all of them.
    "linear_selected_grad_": (
        "(Tensor(a!) selected_grad, Tensor x, Tensor grad_out, Tensor indices, *, "
        "Tensor? rows=None, Tensor? columns=None) -> ()"
    ),
    "topk_indices": "(Tensor[] scores, SymInt k) -> Tensor[]",
    "masked_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
        "Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    ),
    # The same with all tensors' state in one: tensor i has the entries offsets[i]:offsets[i + 1]
    # (int64, on the host). A tensor with as many entries as numbers takes no indices. steps_before
    # counts the steps before this one, and is raised. For small steps: half is reading lists.
    "masked_adamw_packed_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor offsets, Tensor indices, "
        "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, "
        "Tensor(e!)? master, Tensor(f!) steps_before, "
        "Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    ),
    # Moments in bfloat16, without scales, or in uint8, with one for each 32 entries.
    "masked_adamw_quantized_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, "
        "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_scales, "
        "Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] masters, "
        "Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
    ),
}


def linear_fisher_(fisher: Tensor, *args: Any, **kwargs: Any) -> None:
    """Accumulate per-sample squared gradients of a linear layer."""
    choose("linear_fisher_", fisher.device.type)(fisher, *args, **kwargs)


def embedding_fisher_(fisher: Tensor, *args: Any, **kwargs: Any) -> None:
    """Accumulate per-sample squared gradients of an embedding."""
    choose("embedding_fisher_", fisher.device.type)(fisher, *args, **kwargs)


def norm_fisher_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    x_hat: Tensor | None,
    grad_out: Tensor,
    **kwargs: Any,
) -> None:
    """Accumulate per-sample squared gradients of a scale and a shift by feature."""
    run = choose("norm_fisher_", grad_out.device.type)
    run(weight_fisher, bias_fisher, x_hat, grad_out, **kwargs)


def conv_fisher_(fisher: Tensor, *args: Any, **kwargs: Any) -> None:
    """Accumulate per-sample squared gradients of a convolution."""
    choose("conv_fisher_", fisher.device.type)(fisher, *args, **kwargs)


def linear_selected_grad_(selected_grad: Tensor, *args: Any, **kwargs: Any) -> None:
    """Accumulate selected entries of a linear layer's weight gradient."""
    choose("linear_selected_grad_", selected_grad.device.type)(selected_grad, *args, **kwargs)


def topk_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Exact top-k over a list of tensors."""
    if not scores:
        return []
    indices: list[Tensor] = choose("topk_indices", scores[0].device.type)(scores, k)
    return indices


def masked_adamw_(params: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """One AdamW step on the selected entries of a list of tensors."""
    if params:
        choose("masked_adamw_", params[0].device.type)(params, *args, **kwargs)


def masked_adamw_packed_(params: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """``masked_adamw_`` on packed state."""
    if params:
        choose("masked_adamw_packed_", params[0].device.type)(params, *args, **kwargs)


def masked_adamw_quantized_(params: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """``masked_adamw_`` with moments in fewer bits."""
    if params:
        choose("masked_adamw_quantized_", params[0].device.type)(params, *args, **kwargs)


def _mutates_only(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that returns nothing."""


def _fake_topk_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [s.new_empty(context.new_dynamic_size(), dtype=torch.int64) for s in scores]


def _register(function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = function.__name__
    _library.define(name + SCHEMAS[name])
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fishkern::{name}", fake, lib=_library)


_register(linear_fisher_, _mutates_only)
_register(embedding_fisher_, _mutates_only)
_register(norm_fisher_, _mutates_only)
_register(conv_fisher_, _mutates_only)
_register(linear_selected_grad_, _mutates_only)
_register(topk_indices, _fake_topk_indices)
_register(masked_adamw_, _mutates_only)
_register(masked_adamw_packed_, _mutates_only)
_register(masked_adamw_quantized_, _mutates_only)
