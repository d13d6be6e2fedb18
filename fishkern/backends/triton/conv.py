"""Per-sample squared gradients of a convolution, accumulated: patches are read where they lie.

Letters: n sample, t position of the output (in each call of the layer), o output channel and f
entry of the kernel (channel, k0, k1, k2), both within a group. The program is ``linear.py``'s: it
owns a tile of one group's weights and a range of whole samples, and keeps two float32
accumulators. Only the addresses differ: an element of a patch is at the sum of what its position
and what its entry contribute, or is zero where that is outside the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton import INTERPRETED
from fishkern.backends.triton.launch import Launch, ceil_div, run
from fishkern.backends.triton.linear import (
    TILES_PER_SWIZZLE,
    Config,
    choose_config,
    choose_splits,
)
from fishkern.backends.triton.norm import norm_fisher_
from fishkern.backends.triton.operands import TRITON_DTYPES, check_dtypes, strides

MAX_REGISTERS = 255  # per thread, all there are: addresses need many

# Further to the left than any entry or position of an input: what does not exist is put there.
NOWHERE = tl.constexpr(-(2**30))


@triton.jit
def _inside(position, entry, size):
    """Where position (a column) and entry (a row) meet inside the input, in one dimension."""
    at = position[:, None] + entry[None, :]
    return (at >= 0) & (at < size)


# Geometry differs from layer to layer, sizes from batch to batch: neither compiles the kernel anew.
@triton.jit(
    do_not_specialize=[
        *("num_samples", "num_tokens", "samples_per_split", "size_o", "size_f", "channels"),
        *("input_0", "input_1", "input_2", "output_0", "output_1", "output_2"),
        *("kernel_0", "kernel_1", "kernel_2", "step_0", "step_1", "step_2"),
        *("padding_0", "padding_1", "padding_2", "dilation_0", "dilation_1", "dilation_2"),
    ]
)
def _conv_fisher_kernel(
    x_ptr,
    grad_ptr,
    fisher_ptr,
    scores_ptr,
    mask_ptr,
    num_samples,
    num_tokens,
    samples_per_split,
    size_o,
    size_f,
    channels,
    input_0,
    input_1,
    input_2,
    output_0,
    output_1,
    output_2,
    kernel_0,
    kernel_1,
    kernel_2,
    step_0,
    step_1,
    step_2,
    padding_0,
    padding_1,
    padding_2,
    dilation_0,
    dilation_1,
    dilation_2,
    stride_xn,
    stride_xt,
    stride_xc,
    stride_x0,
    stride_x1,
    stride_x2,
    stride_gn,
    stride_gt,
    stride_go,
    stride_g0,
    stride_g1,
    stride_g2,
    stride_fs,
    stride_fo,
    stride_ff,
    stride_mo,
    stride_mf,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    ADD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """One tile of ``fisher (+)= sum_n (sum_t grad_out[n, :, t] patch(x[n], t)^T)^2``, a range of n.

    Grid: (groups * tiles, splits). Spatial dimensions are the last DIMS of three. What split s
    finds goes to ``fisher_ptr + s * stride_fs``, added to what is there if ADD.
    ``scores_ptr[program, n]`` gets the tile's share of sample n's score. INDEX: an integer type
    that holds any distance inside a sample; half the registers go into addresses.
    """
    split = tl.program_id(1).to(tl.int64)
    first = split * samples_per_split
    last = tl.minimum(first + samples_per_split, num_samples)
    program = tl.program_id(0)
    tiles_o = tl.cdiv(size_o, BLOCK_O)
    tiles_f = tl.cdiv(size_f, BLOCK_F)
    group = program // (tiles_o * tiles_f)
    tile = program % (tiles_o * tiles_f)
    tile_o, tile_f = tl.swizzle2d(tile // tiles_f, tile % tiles_f, tiles_o, tiles_f, SWIZZLE)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    f = (tile_f * BLOCK_F + tl.arange(0, BLOCK_F)).to(INDEX)
    in_o = o < size_o
    in_f = f < size_f
    in_tile = in_o[:, None] & in_f[None, :]
    row = (group * size_o + o).to(INDEX)

    entry_2 = f % kernel_2 * dilation_2 - padding_2
    entry_1 = f // kernel_2 % kernel_1 * dilation_1 - padding_1
    entry_0 = f // (kernel_2 * kernel_1) % kernel_0 * dilation_0 - padding_0
    channel = group * channels + f // (kernel_2 * kernel_1 * kernel_0)
    of_entry = channel * stride_xc + entry_2 * stride_x2
    if DIMS > 1:
        of_entry += entry_1 * stride_x1
    if DIMS > 2:
        of_entry += entry_0 * stride_x0
    entry_2 = tl.where(in_f, entry_2, NOWHERE)
    row_of_grad = row * stride_go

    squares = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
    for n in range(first, last):
        total = tl.zeros((BLOCK_O, BLOCK_F), tl.float32)
        for start in range(0, num_tokens, BLOCK_T):
            t = (start + tl.arange(0, BLOCK_T)).to(INDEX)
            in_t = t < num_tokens
            p_2 = t % output_2
            position_2 = p_2 * step_2
            of_position = position_2 * stride_x2
            inside = _inside(tl.where(in_t, position_2, NOWHERE), entry_2, input_2)
            of_grad = p_2 * stride_g2
            rest = t // output_2
            if DIMS > 1:
                p_1 = rest % output_1
                position_1 = p_1 * step_1
                inside &= _inside(position_1, entry_1, input_1)
                of_position += position_1 * stride_x1
                of_grad += p_1 * stride_g1
                rest = rest // output_1
            if DIMS > 2:
                p_0 = rest % output_0
                position_0 = p_0 * step_0
                inside &= _inside(position_0, entry_0, input_0)
                of_position += position_0 * stride_x0
                of_grad += p_0 * stride_g0
                rest = rest // output_0
            of_position += rest * stride_xt  # the call
            of_grad += rest * stride_gt
            x_ptrs = x_ptr + n * stride_xn + (of_position[:, None] + of_entry[None, :])
            grad_ptrs = grad_ptr + n * stride_gn + (row_of_grad[:, None] + of_grad[None, :])
            x = tl.load(x_ptrs, mask=inside, other=0.0).to(DOT_DTYPE)
            grad = tl.load(grad_ptrs, mask=in_o[:, None] & in_t[None, :], other=0.0)
            total = tl.dot(grad.to(DOT_DTYPE), x, total, input_precision="ieee")
        squares += total * total
        if scores_ptr is not None:
            counted = in_tile
            if mask_ptr is not None:
                mask_ptrs = mask_ptr + (row[:, None] * stride_mo + f[None, :] * stride_mf)
                counted = tl.load(mask_ptrs, mask=in_tile, other=0) != 0
            score = tl.sum(tl.where(counted, total * total, 0.0))
            tl.store(scores_ptr + program.to(tl.int64) * num_samples + n, score)

    of_weight = row[:, None] * stride_fo + f[None, :] * stride_ff
    fisher_ptrs = fisher_ptr + split * stride_fs + of_weight
    if ADD:
        squares += tl.load(fisher_ptrs, mask=in_tile, other=0.0)
    tl.store(fisher_ptrs, squares, mask=in_tile)


def conv_fisher_(
    fisher: Tensor,
    x: Tensor,
    grad_out: Tensor,
    *,
    bias_fisher: Tensor | None = None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> None:
    """``fisher += sum_n (sum_p grad_out[n, :, p] patch(x[n], p)^T)^2``: the reference's definition.

    Dtypes, precision and determinism are ``linear_fisher_``'s. The last two arguments are for
    tests, and change the value by rounding at most.

    Args:
        fisher: float32 ``[O, C / groups, *K]``.
        x: ``[N, *, C, *S]``.
        grad_out: ``[N, *, O, *P]``.
        bias_fisher: float32 ``[O]``.
        stride: A number for each spatial dimension, as padding and dilation.
        padding: Zeros on both sides.
        dilation: Distance of the kernel's entries.
        groups: Convolutions side by side.
        sample_scores: float32 ``[N]``.
        mask: bool, of ``fisher``'s shape.
        config: The program's shape; by default ``choose_config``'s.
        splits: Into how many ranges the samples are split; by default ``choose_splits``'s.

    Raises:
        TypeError: A dtype that the kernel does not have.
    """
    check_dtypes({"x": x, "grad_out": grad_out}, fisher, bias_fisher, sample_scores)
    dims = fisher.dim() - 2
    lead = x.dim() - dims - 1
    num_samples, num_calls = x.shape[0], math.prod(x.shape[1:lead])
    inputs, positions = x.shape[lead + 1 :], grad_out.shape[lead + 1 :]
    num_tokens = num_calls * math.prod(positions)
    if num_samples * num_tokens * len(fisher) == 0:
        return
    if bias_fisher is not None:
        norm_fisher_(None, bias_fisher, None, grad_out.movedim(lead, -1))
    size_o, size_f = len(fisher) // groups, math.prod(fisher.shape[1:])
    if size_f == 0:
        return
    ones = (1,) * (3 - dims)
    # views wherever the strides allow one
    x = x.reshape(num_samples, num_calls, x.shape[lead], *ones, *inputs)
    grad_out = grad_out.reshape(num_samples, num_calls, len(fisher), *ones, *positions)
    dot_dtype = torch.promote_types(x.dtype, grad_out.dtype)

    if config is None:
        config = choose_config(
            size_o, size_f, num_tokens, dot_dtype, scores=sample_scores is not None, regular=False
        )
        if config.block_o * config.block_i >= 32 * 64:  # addresses fill the registers of 4 warps
            config = config._replace(num_warps=8)
    num_tiles = ceil_div(size_o, config.block_o) * ceil_div(size_f, config.block_i)
    num_programs = groups * num_tiles
    splits = splits or choose_splits(num_programs, num_samples, config, x.device)
    samples_per_split = ceil_div(num_samples, splits)
    splits = ceil_div(num_samples, samples_per_split)  # so that none is empty

    # One split adds to the accumulator itself; several leave their sums in a buffer.
    flat = fisher.flatten(1)
    joined = flat.data_ptr() == fisher.data_ptr()  # else the kernel's dimensions have odd strides
    out = flat[None] if splits == 1 and joined else flat.new_empty(splits, *flat.shape)
    scores = None if sample_scores is None else fisher.new_empty(num_programs, num_samples)
    flat_mask = None if mask is None else mask.flatten(1)

    geometry = {
        "input": (*ones, *inputs),
        "output": (*ones, *positions),
        "kernel": (*ones, *fisher.shape[2:]),
        "step": (*ones, *stride),
        "padding": (*(0 for _ in ones), *padding),
        "dilation": (*ones, *dilation),
    }
    args = {
        "x_ptr": x,
        "grad_ptr": grad_out,
        "fisher_ptr": out,
        "scores_ptr": scores,
        "mask_ptr": None if flat_mask is None else flat_mask.view(torch.uint8),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "samples_per_split": samples_per_split,
        "size_o": size_o,
        "size_f": size_f,
        "channels": fisher.shape[1],
        **{f"{name}_{d}": v for name, values in geometry.items() for d, v in enumerate(values)},
        **strides(x, "xn", "xt", "xc", "x0", "x1", "x2"),
        **strides(grad_out, "gn", "gt", "go", "g0", "g1", "g2"),
        **strides(out, "fs", "fo", "ff"),
        **strides(flat_mask, "mo", "mf"),
        "DIMS": dims,
        "INDEX": _index_type(x, grad_out, out, flat_mask),
        "ADD": splits == 1 and joined,
        # The interpreter would multiply bfloat16's bits; in float32 the products are the same.
        "DOT_DTYPE": tl.float32 if INTERPRETED else TRITON_DTYPES[dot_dtype],
        "BLOCK_O": config.block_o,
        "BLOCK_F": config.block_i,
        "BLOCK_T": config.block_t,
        "SWIZZLE": TILES_PER_SWIZZLE,
    }
    grid = (num_programs, splits)
    launch = Launch(
        _conv_fisher_kernel, grid, args, config.num_warps, config.num_stages, MAX_REGISTERS
    )
    run(launch, fisher.device)
    if not args["ADD"]:
        fisher += out.sum(0).view_as(fisher)
    if sample_scores is not None and scores is not None:
        sample_scores += scores.sum(0)


def _index_type(x: Tensor, grad_out: Tensor, *flat: Tensor | None) -> tl.dtype:
    """int32 where all distances inside a sample and inside the weights fit, with room to spare."""
    shapes = [(t.shape[1:], t.stride()[1:]) for t in (x, grad_out)]
    shapes += [(t.shape[-2:], t.stride()[-2:]) for t in flat if t is not None]
    extents = [sum(map(mul, size, stride)) for size, stride in shapes]
    return tl.int32 if max(extents) < 2**30 else tl.int64
