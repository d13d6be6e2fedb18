"""Per-sample squared gradients of a convolution, accumulated."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


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
) -> None:
    """``fisher += sum_n (sum_tp grad_out[n, t, :, p] patch(x[n, t], p)^T)^2``.

    Letters: n sample, t call, p position of the output. One sample at a time, so that the extra
    memory is that of its patches and one buffer of ``fisher``'s size. Everything is computed in
    ``fisher.dtype``.
    """
    dims, dtype = fisher.dim() - 2, fisher.dtype
    kernel = fisher.shape[2:]
    x = x.flatten(1, -dims - 2) if x.dim() > dims + 2 else x.unsqueeze(1)
    grad_out = grad_out.reshape(*x.shape[:2], *grad_out.shape[-dims - 1 :])
    num_samples, num_calls, channels = x.shape[:3]
    positions = grad_out.shape[3:].numel()
    outputs, features = fisher.shape[0] // groups, channels // groups * kernel.numel()
    around = [side for p in reversed(padding) for side in (p, p)]
    for n in range(num_samples):
        patches = F.pad(x[n].to(dtype), around)
        for d in range(dims):
            reach = dilation[d] * (kernel[d] - 1) + 1
            patches = patches.unfold(2 + d, reach, stride[d])[..., :: dilation[d]]
        # [calls, channels, *positions, *kernel] -> [groups, calls * positions, features]
        patches = patches.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
        patches = patches.reshape(groups, num_calls * positions, features)
        g = grad_out[n].to(dtype).reshape(num_calls, groups, outputs, positions)
        g = g.permute(1, 2, 0, 3).reshape(groups, outputs, num_calls * positions)
        square = (g @ patches).square_().view_as(fisher)
        fisher += square
        if bias_fisher is not None:
            bias_fisher += g.sum(2).square_().flatten()
        if sample_scores is not None:
            sample_scores[n] += (square if mask is None else square[mask]).sum()
