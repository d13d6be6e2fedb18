"""Per-sample squared gradients of an embedding: sorted segments, a program for each row.

The tokens of the batch are sorted by (row, sample), on the device and without a look at the
result: a segment is a run of tokens of one sample that took one row. There is a program for each
sorted token; those that are not the first of their row return at once. The first goes through
the row's segments - sum, square, add - so that each row has one owner, and no atomics are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton.launch import Launch, ceil_div, run
from fishkern.backends.triton.operands import check_dtypes, strides

# No variant spills registers with these sizes, on any architecture since sm_80 (aot.py tells).
BLOCK_H = 64
BLOCK_T = 16
NUM_WARPS = 4


# Sizes that change from batch to batch must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_samples", "num_tokens", "padding_idx"])
def _embedding_fisher_kernel(
    keys_ptr,
    segment_ends_ptr,
    row_ends_ptr,
    tokens_ptr,
    grad_ptr,
    fisher_ptr,
    scores_ptr,
    mask_ptr,
    num_samples,
    num_tokens,
    num_rows,
    padding_idx,
    size,
    stride_gn,
    stride_gt,
    stride_gh,
    stride_fv,
    stride_fh,
    stride_mv,
    stride_mh,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of columns of one row of ``fisher``. Grid: (sorted tokens, blocks of columns).

    ``keys_ptr[p]``, ascending, is the p-th token's ``row * num_samples + sample``;
    ``tokens_ptr[p]`` its place in the batch. ``scores_ptr[block, place]`` gets a segment's part of
    its sample's score, at the place of the segment's first token.
    """
    position = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    row = tl.load(keys_ptr + position) // num_samples
    before = tl.load(keys_ptr + position - 1, mask=position > 0, other=-num_samples) // num_samples
    if (before == row) | (row == padding_idx) | (row < 0) | (row >= num_rows):
        return

    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = h < size
    counted = in_h
    if mask_ptr is not None:
        mask_ptrs = mask_ptr + row * stride_mv + h * stride_mh
        counted = tl.load(mask_ptrs, mask=in_h, other=0) != 0
    last = tl.load(row_ends_ptr + position)
    squares = tl.zeros((BLOCK_H,), tl.float32)
    while position < last:
        n = tl.load(keys_ptr + position) % num_samples
        end = tl.load(segment_ends_ptr + position)
        total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for start in range(position, end, BLOCK_T):
            p = start + tl.arange(0, BLOCK_T)
            in_p = p < end
            t = tl.load(tokens_ptr + p, mask=in_p, other=0) - n * num_tokens
            grad_ptrs = grad_ptr + n * stride_gn + t[:, None] * stride_gt + h[None, :] * stride_gh
            inside = in_p[:, None] & in_h[None, :]
            total += tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        sums = tl.sum(total, axis=0)
        squares += sums * sums
        if scores_ptr is not None:
            place = tl.load(tokens_ptr + position)
            score = tl.sum(tl.where(counted, sums * sums, 0.0))
            tl.store(scores_ptr + block * num_samples * num_tokens + place, score)
        position = end
    fisher_ptrs = fisher_ptr + row * stride_fv + h * stride_fh
    squares += tl.load(fisher_ptrs, mask=in_h, other=0.0)
    tl.store(fisher_ptrs, squares, mask=in_h)


def embedding_fisher_(
    fisher: Tensor,
    ids: Tensor,
    grad_out: Tensor,
    *,
    padding_idx: int | None = None,
    sample_scores: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """``fisher[v] += sum_n (sum_{t: ids[n,t] = v} grad_out[n,t])^2``, as the reference does it.

    Nothing waits for the device. Deterministic bit for bit. An id out of range is never written
    to and stops the device with an assertion, as it does in an embedding.

    Args:
        fisher: float32 ``[V, H]``.
        ids: int32 or int64 ``[N, *]``.
        grad_out: ``[N, *, H]``, float32, bfloat16 or float16, any strides.
        padding_idx: A row that gets nothing.
        sample_scores: float32 ``[N]``.
        mask: bool ``[V, H]``.

    Raises:
        TypeError: A dtype that the kernel does not have.
    """
    check_dtypes({"grad_out": grad_out}, fisher, sample_scores)
    num_samples, num_tokens = ids.shape[0], ids.shape[1:].numel()
    num_rows, size = fisher.shape
    if ids.numel() == 0 or size == 0:
        return
    ids = ids.reshape(num_samples, num_tokens).long()
    grad_out = grad_out.reshape(num_samples, num_tokens, size)  # a view wherever there is one
    torch._assert_async(
        ((ids >= 0) & (ids < num_rows)).all(), f"ids are out of range: fisher has {num_rows} rows"
    )
    samples = torch.arange(num_samples, device=ids.device).unsqueeze(1)
    keys, tokens = (ids * num_samples + samples).flatten().sort(stable=True)
    rows = keys.div(num_samples, rounding_mode="floor")

    blocks = ceil_div(size, BLOCK_H)
    scores = None if sample_scores is None else fisher.new_zeros(blocks, num_samples, num_tokens)
    args = {
        "keys_ptr": keys,
        "segment_ends_ptr": torch.searchsorted(keys, keys, right=True),
        "row_ends_ptr": torch.searchsorted(rows, rows, right=True),
        "tokens_ptr": tokens,
        "grad_ptr": grad_out,
        "fisher_ptr": fisher,
        "scores_ptr": scores,
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "num_samples": num_samples,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "padding_idx": -1 if padding_idx is None else padding_idx,
        "size": size,
        **strides(grad_out, "gn", "gt", "gh"),
        **strides(fisher, "fv", "fh"),
        **strides(mask, "mv", "mh"),
        "BLOCK_H": BLOCK_H,
        "BLOCK_T": BLOCK_T,
    }
    grid = (num_samples * num_tokens, blocks)
    run(Launch(_embedding_fisher_kernel, grid, args, NUM_WARPS, num_stages=3), fisher.device)
    if sample_scores is not None and scores is not None:
        sample_scores += scores.sum((0, 2))
