"""Selected entries of a linear layer's weight gradient: tiles that have one, and nothing else.

Letters: p token of any sample, i input feature, o output feature. A program owns one tile of the
gradient and a range of tokens. It looks up which of the sorted positions lie in its rows; if none
lies in the tile it returns before it reads an operand. Each number of the finished tile then finds
its own place in the list by bisection: nothing is stored per entry beside the list itself, and
each selected entry has one owner, so that no atomics are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton import INTERPRETED
from fishkern.backends.triton.launch import Launch, ceil_div, next_power_of_2, run
from fishkern.backends.triton.linear import TILES_PER_SWIZZLE, Config, choose_splits
from fishkern.backends.triton.operands import TRITON_DTYPES, check_dtypes, strides


def choose_config(size_o: int, size_i: int, dtype: torch.dtype) -> Config:
    """64 x 64, which leaves few tiles of a mask without an entry and few entries to look up.

    A side is no wider than the matrix. float32 is multiplied without tensor cores, in short steps.
    None spills registers on sm_80 and sm_90: ``aot.py`` checks.
    """
    block_o, block_i = (max(16, min(64, next_power_of_2(size))) for size in (size_o, size_i))
    step = 16 if dtype == torch.float32 else 64
    return Config(
        block_o, block_i, step, num_warps=8 if block_o * block_i >= 2048 else 4, num_stages=3
    )


@triton.jit
def _lower_bound(indices_ptr, low, high, row_start, column, steps):
    """The first place in [low, high) whose position, from ``row_start`` on, is not < column."""
    for _ in range(steps):
        open_ = low < high
        middle = (low + high) // 2
        found = tl.load(indices_ptr + middle, mask=open_, other=0).to(tl.int64) - row_start
        right = open_ & (found < column)
        low = tl.where(right, middle + 1, low)
        high = tl.where(open_ & (found >= column), middle, high)
    return low


# Sizes that change from batch to batch, or from mask to mask, must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split", "row_steps", "stride_os"])
def _linear_selected_grad_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    indices_ptr,
    row_begin_ptr,
    rows_ptr,
    columns_ptr,
    num_tokens,
    tokens_per_split,
    row_steps,
    size_o,
    size_i,
    stride_xp,
    stride_xi,
    stride_gp,
    stride_go,
    stride_os,
    stride_ok,
    ADD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_STEPS: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """One tile of ``(sum_p grad_out[p, rows] x[p, columns]^T).flatten()[indices]``.

    Grid: (tiles, splits of the tokens). Row o has the places row_begin[o] .. row_begin[o + 1] of
    indices. What split s finds goes to ``out_ptr + s * stride_os``, added to what is there if ADD.
    ``row_steps`` and TILE_STEPS: enough bisections for a row, and for a row of a tile.
    """
    tile = tl.program_id(0)
    tiles_o = tl.cdiv(size_o, BLOCK_O)
    tiles_i = tl.cdiv(size_i, BLOCK_I)
    tile_o, tile_i = tl.swizzle2d(tile // tiles_i, tile % tiles_i, tiles_o, tiles_i, SWIZZLE)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_o = o < size_o
    in_i = i < size_i

    row_start = o * size_i
    begin = tl.load(row_begin_ptr + o, mask=in_o, other=0).to(tl.int32)
    end = tl.load(row_begin_ptr + o + 1, mask=in_o, other=0).to(tl.int32)
    begin = _lower_bound(indices_ptr, begin, end, row_start, tile_i * BLOCK_I, row_steps)
    end = _lower_bound(indices_ptr, begin, end, row_start, (tile_i + 1) * BLOCK_I, row_steps)
    if tl.max(end - begin) == 0:
        return

    row, column = o, i.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + o, mask=in_o, other=0).to(tl.int64)
    if columns_ptr is not None:
        column = tl.load(columns_ptr + i, mask=in_i, other=0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    p = first + tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + p[:, None] * stride_xp + column[None, :] * stride_xi
    grad_ptrs = grad_ptr + row[:, None] * stride_go + p[None, :] * stride_gp
    step = tl.full((), BLOCK_T, tl.int64)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(first, last, BLOCK_T):
        in_p = tl.arange(0, BLOCK_T) < last - start
        x = tl.load(x_ptrs, mask=in_p[:, None] & in_i[None, :], other=0.0).to(DOT_DTYPE)
        grad = tl.load(grad_ptrs, mask=in_o[:, None] & in_p[None, :], other=0.0).to(DOT_DTYPE)
        total = tl.dot(grad, x, total, input_precision="ieee")
        x_ptrs += step * stride_xp
        grad_ptrs += step * stride_gp

    none = tl.zeros((BLOCK_O, BLOCK_I), tl.int32)
    places = _lower_bound(
        indices_ptr,
        begin[:, None] + none,
        end[:, None] + none,
        row_start[:, None],
        i[None, :],
        TILE_STEPS,
    )
    listed = places < end[:, None]
    found = tl.load(indices_ptr + places, mask=listed, other=-1).to(tl.int64) - row_start[:, None]
    selected = listed & (found == i[None, :]) & in_i[None, :]
    out_ptrs = out_ptr + split * stride_os + places.to(tl.int64) * stride_ok
    if ADD:
        total += tl.load(out_ptrs, mask=selected, other=0.0)
    tl.store(out_ptrs, total, mask=selected)


def linear_selected_grad_(
    selected_grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    indices: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> None:
    """``selected_grad += (sum_p grad_out[p, rows] x[p, columns]^T).flatten()[indices]``.

    ``x`` and ``grad_out`` may be float32, bfloat16 or float16 with any strides; where their dtypes
    differ, both are widened. float32 is multiplied in float32, never in TF32. Deterministic bit
    for bit: every entry has one owner, and the splits' sums are added in a fixed order. Nothing
    waits for the device. The last two arguments are for tests:

    Args:
        selected_grad: float32 ``[k]``.
        x: ``[*, I]``.
        grad_out: ``[*, O]``.
        indices: Ascending flat positions in ``[rows, columns]``, int32 or int64.
        rows: Which of the O outputs are read; None: all.
        columns: Which of the I inputs are read, gathered as they are loaded; None: all.
        config: The program's shape; by default ``choose_config``'s.
        splits: Into how many ranges the tokens are split; by default ``choose_splits``'s.

    Raises:
        TypeError: A dtype that the kernel does not have.
    """
    check_dtypes({"x": x, "grad_out": grad_out}, selected_grad)
    num_tokens, count = x.shape[:-1].numel(), len(indices)
    if num_tokens * count == 0:
        return
    x = x.reshape(num_tokens, x.shape[-1])  # a view wherever the strides allow one
    grad_out = grad_out.reshape(num_tokens, grad_out.shape[-1])
    size_o = grad_out.shape[1] if rows is None else len(rows)
    size_i = x.shape[1] if columns is None else len(columns)
    dot_dtype = torch.promote_types(x.dtype, grad_out.dtype)

    if size_o * size_i > torch.iinfo(indices.dtype).max:
        indices = indices.long()
    indices = indices.contiguous()
    starts = torch.arange(size_o + 1, device=x.device, dtype=indices.dtype) * size_i
    config = config or choose_config(size_o, size_i, dot_dtype)
    num_tiles = ceil_div(size_o, config.block_o) * ceil_div(size_i, config.block_i)
    num_steps = ceil_div(num_tokens, config.block_t)
    splits = splits or choose_splits(min(num_tiles, count), num_steps, config, x.device)
    tokens_per_split = ceil_div(num_steps, splits) * config.block_t
    splits = ceil_div(num_tokens, tokens_per_split)  # so that none is empty

    # One split adds to the accumulator itself; several leave their sums in a buffer.
    out = selected_grad[None] if splits == 1 else selected_grad.new_empty(splits, count)
    args = {
        "x_ptr": x,
        "grad_ptr": grad_out,
        "out_ptr": out,
        "indices_ptr": indices,
        "row_begin_ptr": torch.searchsorted(indices, starts),
        "rows_ptr": None if rows is None else rows.contiguous(),
        "columns_ptr": None if columns is None else columns.contiguous(),
        "num_tokens": num_tokens,
        "tokens_per_split": tokens_per_split,
        "row_steps": size_i.bit_length(),
        "size_o": size_o,
        "size_i": size_i,
        **strides(x, "xp", "xi"),
        **strides(grad_out, "gp", "go"),
        **strides(out, "os", "ok"),
        "ADD": splits == 1,
        # The interpreter would multiply bfloat16's bits; in float32 the products are the same.
        "DOT_DTYPE": tl.float32 if INTERPRETED else TRITON_DTYPES[dot_dtype],
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "BLOCK_T": config.block_t,
        "TILE_STEPS": config.block_i.bit_length(),
        "SWIZZLE": TILES_PER_SWIZZLE,
    }
    launch = Launch(
        _linear_selected_grad_kernel,
        (num_tiles, splits),
        args,
        config.num_warps,
        config.num_stages,
    )
    run(launch, selected_grad.device)
    if splits > 1:
        selected_grad += out.sum(0)
