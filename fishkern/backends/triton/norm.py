"""Per-sample squared gradients of a scale and a shift by feature: one pass over grad_out.

Letters: n sample, t token, c feature. A program owns a block of features and a range of whole
samples: tokens are summed before the square, so they are never split between programs; samples
are, and the partial sums are added in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton.launch import Launch, ceil_div, num_multiprocessors, run
from fishkern.backends.triton.operands import check_dtypes, strides

# Small programs, many of them: the work is reading. No variant spills registers with these sizes,
# on any architecture since sm_80; others do (aot.py tells).
BLOCK_C = 64
BLOCK_T = 8
NUM_WARPS = 2
PROGRAMS_PER_MULTIPROCESSOR = 16


@triton.jit
def _score(sums, mask_ptr, c, in_c, stride_m):
    """The sum of squares, of those inside the mask."""
    counted = in_c
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + c * stride_m, mask=in_c, other=0) != 0
    return tl.sum(tl.where(counted, sums * sums, 0.0))


@triton.jit
def _store(out_ptrs, squares, in_c, ADD: tl.constexpr):
    if ADD:
        squares += tl.load(out_ptrs, mask=in_c, other=0.0)
    tl.store(out_ptrs, squares, mask=in_c)


# Sizes that change from batch to batch must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_samples", "num_tokens", "samples_per_split"])
def _norm_fisher_kernel(
    x_ptr,
    grad_ptr,
    weight_ptr,
    bias_ptr,
    scores_ptr,
    weight_mask_ptr,
    bias_mask_ptr,
    num_samples,
    num_tokens,
    samples_per_split,
    size,
    stride_xn,
    stride_xt,
    stride_xc,
    stride_gn,
    stride_gt,
    stride_gc,
    stride_ws,
    stride_wc,
    stride_bs,
    stride_bc,
    stride_wm,
    stride_bm,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of features of both accumulators, for a range of n. Grid: (blocks, splits).

    What split s finds goes to ``weight_ptr + s * stride_ws`` (and the same of the bias), added to
    what is there if ADD. ``scores_ptr[block, n]`` gets the block's share of sample n's score.
    """
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    first = split * samples_per_split
    last = tl.minimum(first + samples_per_split, num_samples)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < size
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    step = tl.full((), BLOCK_T, tl.int64)

    weight_squares = tl.zeros((BLOCK_C,), tl.float32)
    bias_squares = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(first, last):
        grad_ptrs = grad_ptr + n * stride_gn + t[:, None] * stride_gt + c[None, :] * stride_gc
        weight_total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        bias_total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        if weight_ptr is not None:
            x_ptrs = x_ptr + n * stride_xn + t[:, None] * stride_xt + c[None, :] * stride_xc
        for start in range(0, num_tokens, BLOCK_T):
            inside = (t < num_tokens - start)[:, None] & in_c[None, :]
            grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
            grad_ptrs += step * stride_gt
            if weight_ptr is not None:
                weight_total += grad * tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
                x_ptrs += step * stride_xt
            if bias_ptr is not None:
                bias_total += grad
        score = 0.0
        if weight_ptr is not None:
            weight_sums = tl.sum(weight_total, axis=0)
            weight_squares += weight_sums * weight_sums
            if scores_ptr is not None:
                score += _score(weight_sums, weight_mask_ptr, c, in_c, stride_wm)
        if bias_ptr is not None:
            bias_sums = tl.sum(bias_total, axis=0)
            bias_squares += bias_sums * bias_sums
            if scores_ptr is not None:
                score += _score(bias_sums, bias_mask_ptr, c, in_c, stride_bm)
        if scores_ptr is not None:
            tl.store(scores_ptr + block * num_samples + n, score)

    if weight_ptr is not None:
        _store(weight_ptr + split * stride_ws + c * stride_wc, weight_squares, in_c, ADD)
    if bias_ptr is not None:
        _store(bias_ptr + split * stride_bs + c * stride_bc, bias_squares, in_c, ADD)


def norm_fisher_(
    weight_fisher: Tensor | None,
    bias_fisher: Tensor | None,
    x_hat: Tensor | None,
    grad_out: Tensor,
    *,
    sample_scores: Tensor | None = None,
    weight_mask: Tensor | None = None,
    bias_mask: Tensor | None = None,
    splits: int | None = None,
) -> None:
    """``weight_fisher += sum_n (sum_t grad_out x_hat)^2``, as the reference defines it.

    Deterministic bit for bit: every number has one owner, and partial sums are added in a fixed
    order.

    Args:
        weight_fisher: float32 ``[C]``.
        bias_fisher: float32 ``[C]``.
        x_hat: ``[N, *, C]``, float32, bfloat16 or float16, any strides.
        grad_out: The same.
        sample_scores: float32 ``[N]``.
        weight_mask: bool ``[C]``.
        bias_mask: bool ``[C]``.
        splits: Into how many ranges the samples are split (for tests); by default so many that
            the programs fill the device.

    Raises:
        TypeError: A dtype that the kernel does not have.
    """
    x_hat = x_hat if weight_fisher is not None else None
    check_dtypes({"x_hat": x_hat, "grad_out": grad_out}, weight_fisher, bias_fisher, sample_scores)
    num_samples, num_tokens = grad_out.shape[0], math.prod(grad_out.shape[1:-1])
    size = grad_out.shape[-1]
    if grad_out.numel() == 0 or (weight_fisher is None and bias_fisher is None):
        return
    grad_out = grad_out.reshape(num_samples, num_tokens, size)  # a view wherever there is one
    if x_hat is not None:
        x_hat = x_hat.reshape(num_samples, num_tokens, size)

    blocks = ceil_div(size, BLOCK_C)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(grad_out.device) // blocks
    splits = splits or min(max(wanted, 1), num_samples)
    samples_per_split = ceil_div(num_samples, splits)
    splits = ceil_div(num_samples, samples_per_split)  # so that none is empty

    # One split adds to the accumulators itself; several leave their sums in buffers.
    accumulators = weight_fisher, bias_fisher
    outs = [
        None if f is None else (f[None] if splits == 1 else f.new_empty(splits, size))
        for f in accumulators
    ]
    scores = None if sample_scores is None else sample_scores.new_empty(blocks, num_samples)
    masks = [None if m is None else m.view(torch.uint8) for m in (weight_mask, bias_mask)]
    args = {
        "x_ptr": x_hat,
        "grad_ptr": grad_out,
        "weight_ptr": outs[0],
        "bias_ptr": outs[1],
        "scores_ptr": scores,
        "weight_mask_ptr": masks[0],
        "bias_mask_ptr": masks[1],
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "samples_per_split": samples_per_split,
        "size": size,
        **strides(x_hat, "xn", "xt", "xc"),
        **strides(grad_out, "gn", "gt", "gc"),
        **strides(outs[0], "ws", "wc"),
        **strides(outs[1], "bs", "bc"),
        **strides(weight_mask, "wm"),
        **strides(bias_mask, "bm"),
        "ADD": splits == 1,
        "BLOCK_C": BLOCK_C,
        "BLOCK_T": BLOCK_T,
    }
    launch = Launch(_norm_fisher_kernel, (blocks, splits), args, NUM_WARPS, num_stages=3)
    run(launch, grad_out.device)

    for fisher, out in zip(accumulators, outs, strict=True):
        if splits > 1 and fisher is not None and out is not None:
            fisher += out.sum(0)
    if sample_scores is not None and scores is not None:
        sample_scores += scores.sum(0)
