"""Per-sample squared gradients of a linear layer, accumulated: one pass over its operands.

Letters: n sample, t token, i input feature, o output feature. The work is a batched matrix
product that never leaves the chip: a program owns one tile of the weight and a range of whole
samples, and keeps two float32 accumulators, this sample's sum over tokens and the sum of its
squares over samples. The square must come after the whole sum over tokens, so tokens are never
split between programs; samples are, and the partial sums are added in a fixed order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton import INTERPRETED
from fishkern.backends.triton.launch import (
    Launch,
    ceil_div,
    next_power_of_2,
    num_multiprocessors,
    run,
)
from fishkern.backends.triton.operands import TRITON_DTYPES, check_dtypes, strides

TILES_PER_SWIZZLE = 8  # tiles that share rows of grad_out run together, so that L2 serves them


class Config(NamedTuple):
    """The shape of a program: tile sizes and how it is run."""

    block_o: int
    block_i: int
    block_t: int
    num_warps: int
    num_stages: int


def choose_config(
    size_o: int,
    size_i: int,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    scores: bool = False,
    regular: bool = True,
) -> Config:
    """The program's shape for a layer's shape; any choice gives the same value up to rounding.

    * A side of at most 64 (the rank of an adapter) is one tile, just wide enough: such layers
      are bound by memory, and the long operand is read once.
    * Otherwise 128 x 128, the largest tile whose two accumulators fit the registers; half of
      it where ``scores`` are summed beside them.
    * float32 is multiplied without tensor cores, and operands that are not ``regular`` (16-byte
      vectors along the features) are loaded through registers: 64 is the long side for both.
    * Few tokens take a short loop step, at least the 16 that the hardware multiplies at once.

    Every choice stays under the 99 KiB of shared memory that all GPUs since Ampere have, and
    none spills registers on sm_80 and sm_90: ``aot.py`` checks both.
    """
    narrow = max(16, next_power_of_2(min(size_o, size_i)))
    simple = dtype == torch.float32 or not regular
    longest, longest_step = (64, 16) if simple else (128, 64)
    long, short = longest, min(longest, narrow)
    if scores and short > 32:
        short //= 2
    sides = (short, long) if size_o < size_i else (long, short)
    step = min(longest_step, max(16, next_power_of_2(num_tokens)))
    num_warps = 8 if long * short >= (64 * 64 if simple else 128 * 64) else 4
    return Config(*sides, step, num_warps, num_stages=3)


def choose_splits(num_tiles: int, num_samples: int, config: Config, device: torch.device) -> int:
    """Into how many ranges the samples are split, so that the programs fill the device."""
    per_multiprocessor = 16 // config.num_warps
    wanted = per_multiprocessor * num_multiprocessors(device) // max(num_tiles, 1)
    return min(max(wanted, 1), num_samples)


@triton.jit
def _bias_tile(
    grad_ptr,
    bias_ptr,
    first,
    last,
    num_tokens,
    o,
    size_o,
    stride_gn,
    stride_gt,
    stride_go,
    stride_bo,
    SQUARE_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``bias_fisher (+)= sum_n (sum_t grad_out[n, t])^2`` for one range of o and of n."""
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    in_o = o < size_o
    step = tl.full((), BLOCK_T, tl.int64)
    squares = tl.zeros((BLOCK_O,), tl.float32)
    for n in range(first, last):
        grad_ptrs = grad_ptr + n * stride_gn + o[:, None] * stride_go + t[None, :] * stride_gt
        total = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for start in range(0, num_tokens, BLOCK_T):
            inside = in_o[:, None] & (t < num_tokens - start)[None, :]
            grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
            total += grad * grad if SQUARE_FIRST else grad
            grad_ptrs += step * stride_gt
        sums = tl.sum(total, axis=1)
        squares += sums if SQUARE_FIRST else sums * sums
    bias_ptrs = bias_ptr + o * stride_bo
    if ADD:
        squares += tl.load(bias_ptrs, mask=in_o, other=0.0)
    tl.store(bias_ptrs, squares, mask=in_o)


# Sizes that change from batch to batch must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_samples", "num_tokens", "samples_per_split"])
def _linear_fisher_kernel(
    x_ptr,
    grad_ptr,
    fisher_ptr,
    bias_ptr,
    scores_ptr,
    mask_ptr,
    num_samples,
    num_tokens,
    samples_per_split,
    size_o,
    size_i,
    stride_xn,
    stride_xt,
    stride_xi,
    stride_gn,
    stride_gt,
    stride_go,
    stride_fs,
    stride_fo,
    stride_fi,
    stride_bs,
    stride_bo,
    stride_mo,
    stride_mi,
    SQUARE_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """One tile of ``fisher (+)= sum_n (sum_t grad_out[n, t] x[n, t]^T)^2``, for a range of n.

    Grid: (tiles, splits); where there is a bias, its tiles follow the weight's. Accumulates in
    float32. What split s finds goes to ``fisher_ptr + s * stride_fs``, added to what is there if
    ADD. ``scores_ptr[tile, n]`` gets the tile's share of sample n's score. SQUARE_FIRST: where
    each sum over t has one term, its square is the product of squares; the caller passes the
    samples as tokens, to be multiplied all at once.
    """
    split = tl.program_id(1).to(tl.int64)
    if SQUARE_FIRST:
        first, last = 0, 1
    else:
        first = split * samples_per_split
        last = tl.minimum(first + samples_per_split, num_samples)
    tile = tl.program_id(0)
    tiles_o = tl.cdiv(size_o, BLOCK_O)
    tiles_i = tl.cdiv(size_i, BLOCK_I)
    if bias_ptr is not None:  # noqa: SIM102 (decided when compiling)
        if tile >= tiles_o * tiles_i:
            bias_o = (tile - tiles_o * tiles_i).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
            _bias_tile(
                grad_ptr,
                bias_ptr + split * stride_bs,
                first,
                last,
                num_tokens,
                bias_o,
                size_o,
                stride_gn,
                stride_gt,
                stride_go,
                stride_bo,
                SQUARE_FIRST,
                ADD,
                BLOCK_O,
                BLOCK_T,
            )
            return

    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, SWIZZLE)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    in_o = o < size_o
    in_i = i < size_i
    in_tile = in_o[:, None] & in_i[None, :]
    step = tl.full((), BLOCK_T, tl.int64)

    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for n in tl.range(first, last, flatten=True):
        x_ptrs = x_ptr + n * stride_xn + t[:, None] * stride_xt + i[None, :] * stride_xi
        grad_ptrs = grad_ptr + n * stride_gn + o[:, None] * stride_go + t[None, :] * stride_gt
        total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, num_tokens, BLOCK_T):
            in_t = t < num_tokens - start
            x = tl.load(x_ptrs, mask=in_t[:, None] & in_i[None, :], other=0.0).to(DOT_DTYPE)
            grad = tl.load(grad_ptrs, mask=in_o[:, None] & in_t[None, :], other=0.0)
            grad = grad.to(DOT_DTYPE)
            if SQUARE_FIRST:
                x = x * x
                grad = grad * grad
            total = tl.dot(grad, x, total, input_precision="ieee")
            x_ptrs += step * stride_xt
            grad_ptrs += step * stride_gt
        squares += total if SQUARE_FIRST else total * total
        if scores_ptr is not None:
            counted = in_tile
            if mask_ptr is not None:
                mask_ptrs = mask_ptr + o[:, None] * stride_mo + i[None, :] * stride_mi
                counted = tl.load(mask_ptrs, mask=in_tile, other=0) != 0
            score = tl.sum(tl.where(counted, total * total, 0.0))
            tl.store(scores_ptr + tile.to(tl.int64) * num_samples + n, score)

    fisher_ptrs = fisher_ptr + split * stride_fs + o[:, None] * stride_fo + i[None, :] * stride_fi
    if ADD:
        squares += tl.load(fisher_ptrs, mask=in_tile, other=0.0)
    tl.store(fisher_ptrs, squares, mask=in_tile)


def linear_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
    square_first: bool | None = None,
) -> None:
    """``fisher += sum_n (sum_t grad_out[n, t] x[n, t]^T)^2``, as the reference defines it.

    ``x`` and ``grad_out`` may be float32, bfloat16 or float16 with any strides; where their
    dtypes differ, both are widened. float32 is multiplied in float32, never in TF32.
    Deterministic bit for bit: every number has one owner, and partial sums are added in a fixed
    order. The last three arguments are for tests, and change the value by rounding at most:

    Args:
        fisher: float32 ``[O, I]``.
        x: ``[N, *, I]``.
        grad_out: ``[N, *, O]``.
        bias_fisher: float32 ``[O]``.
        sample_scores: float32 ``[N]``.
        mask: bool ``[O, I]``.
        config: The program's shape; by default ``choose_config``'s.
        splits: Into how many ranges the samples are split; by default ``choose_splits``'s.
        square_first: With one token per sample, multiply the squares of the operands: half the
            arithmetic. By default wherever it is possible: one token, and no ``sample_scores``.

    Raises:
        TypeError: A dtype that the kernel does not have.
    """
    check_dtypes({"x": x, "grad_out": grad_out}, fisher, bias_fisher, sample_scores)
    num_samples, num_tokens = x.shape[0], math.prod(x.shape[1:-1])
    size_o, size_i = fisher.shape
    if num_samples * num_tokens * size_o == 0 or (size_i == 0 and bias_fisher is None):
        return
    x = x.reshape(num_samples, num_tokens, size_i)  # a view wherever the strides allow one
    grad_out = grad_out.reshape(num_samples, num_tokens, size_o)
    dot_dtype = torch.promote_types(x.dtype, grad_out.dtype)

    possible = num_tokens == 1 and sample_scores is None
    if square_first and not possible:
        raise ValueError("square_first needs one token per sample, and no sample_scores")
    if possible and square_first is not False:
        square_first, dot_dtype = True, torch.float32
        x, grad_out = x.transpose(0, 1), grad_out.transpose(0, 1)
        num_samples, num_tokens = 1, num_samples

    config = config or choose_config(
        size_o,
        size_i,
        num_tokens,
        dot_dtype,
        scores=sample_scores is not None,
        regular=_is_regular(x) and _is_regular(grad_out),
    )
    tiles_o = ceil_div(size_o, config.block_o)
    num_tiles = tiles_o * ceil_div(size_i, config.block_i)
    splits = splits or choose_splits(num_tiles, num_samples, config, x.device)
    samples_per_split = ceil_div(num_samples, splits)
    splits = ceil_div(num_samples, samples_per_split)  # so that none is empty

    # One split adds to the accumulators itself; several leave their sums in buffers.
    fisher_out, bias_out = fisher[None], None if bias_fisher is None else bias_fisher[None]
    if splits > 1:
        fisher_out = fisher.new_empty(splits, size_o, size_i)
        bias_out = None if bias_fisher is None else fisher.new_empty(splits, size_o)
    scores = None if sample_scores is None else fisher.new_empty(num_tiles, num_samples)

    args = {
        "x_ptr": x,
        "grad_ptr": grad_out,
        "fisher_ptr": fisher_out,
        "bias_ptr": bias_out,
        "scores_ptr": scores,
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "samples_per_split": samples_per_split,
        "size_o": size_o,
        "size_i": size_i,
        **strides(x, "xn", "xt", "xi"),
        **strides(grad_out, "gn", "gt", "go"),
        **strides(fisher_out, "fs", "fo", "fi"),
        **strides(bias_out, "bs", "bo"),
        **strides(mask, "mo", "mi"),
        "SQUARE_FIRST": bool(square_first),
        "ADD": splits == 1,
        # The interpreter would multiply bfloat16's bits; in float32 the products are the same.
        "DOT_DTYPE": tl.float32 if INTERPRETED else TRITON_DTYPES[dot_dtype],
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "BLOCK_T": config.block_t,
        "SWIZZLE": TILES_PER_SWIZZLE,
    }
    grid = (num_tiles + (0 if bias_fisher is None else tiles_o), splits)
    launch = Launch(_linear_fisher_kernel, grid, args, config.num_warps, config.num_stages)
    run(launch, fisher.device)

    if splits > 1:
        fisher += fisher_out.sum(0)
        if bias_fisher is not None and bias_out is not None:
            bias_fisher += bias_out.sum(0)
    if sample_scores is not None and scores is not None:
        sample_scores += scores.sum(0)


def _is_regular(operand: Tensor) -> bool:
    """Whether ``[N, T, features]`` can be loaded in 16-byte vectors along the features."""
    vector = 16 // operand.element_size()
    return operand.stride(-1) == 1 and all(
        number % vector == 0 for number in (operand.shape[-1], *operand.stride()[:-1])
    )
