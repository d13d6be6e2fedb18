"""What made a layer's input, where its maker keeps that for its own backward pass anyhow.

An activation function, a product and a norm keep what they read, or what they made. Then nothing of
their result has to be kept for a layer that reads it: in the backward pass the columns that its
selected entries need are made again, of the same columns of what is kept.

    gelu, silu    x = f(h)                      h is kept
    a product     x = a b                       a and b, if both need gradients (a gated MLP)
    LayerNorm     x = (u - mean) rstd w + b     all of these
    relu, ...     x                             x itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Made(NamedTuple):
    """How to make columns of a tensor again.

    Attributes:
        by: The name of the maker.
        tensors: What it keeps and they are made of.
        columns: Called with features ``[C]`` (None: all) and the tensors; returns ``[*, C]``.
    """

    by: str
    tensors: Sequence[Tensor]
    columns: Callable[..., Tensor]


def made(x: Tensor) -> Made | None:
    """How columns of x can be made again; None if nobody keeps what that takes.

    Tensors that others may see in another form than they were kept in - packed by
    ``saved_tensors_hooks``, which offload or compress them - are not asked for.
    """
    node: Any = x.grad_fn
    if node is None or type(x) is not Tensor or x._version != 0:  # it was written to
        return None
    reading = _READINGS.get(node.name())
    if reading is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    found = reading(node, x)
    if found is None:
        return None
    tensors, columns = found
    # Without their graphs: that the maker's is there is the maker's business.
    return Made(node.name(), [tensor.detach() for tensor in tensors], columns)


def gathered(x: Tensor, columns: Tensor | None) -> Tensor:
    """``x[..., columns]``, or x, by torch's faster way, which is for matrices."""
    if columns is None:
        return x
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat.index_select(1, columns).view(*x.shape[:-1], len(columns))


_Reading = tuple[Sequence[Tensor], Callable[..., Tensor]] | None


def _gelu(node: Any, x: Tensor) -> _Reading:
    kind = node._saved_approximate
    return [node._saved_self], lambda columns, h: F.gelu(gathered(h, columns), approximate=kind)


def _silu(node: Any, x: Tensor) -> _Reading:
    return [node._saved_self], lambda columns, h: F.silu(gathered(h, columns))


def _result(node: Any, x: Tensor) -> _Reading:
    return [x], lambda columns, x: gathered(x, columns)


def _product(node: Any, x: Tensor) -> _Reading:
    a, b = node._saved_self, node._saved_other
    if a is None or b is None or not a.shape[-1:] == b.shape[-1:] == x.shape[-1:]:
        return None  # a factor's gradient alone is needed, or one is the same for all features
    return [a, b], lambda columns, a, b: gathered(a, columns) * gathered(b, columns)


def _layer_norm(node: Any, x: Tensor) -> _Reading:
    u, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    weight, bias = node._saved_weight, node._saved_bias
    if weight is None or bias is None:
        return None
    if not u.dtype == mean.dtype == x.dtype == torch.float32:  # narrower ones are kept rounded
        return None

    def columns_of(columns: Tensor | None, *tensors: Tensor) -> Tensor:
        u, mean, rstd, weight, bias = tensors
        x_hat = (gathered(u, columns) - mean) * rstd
        # Rounded as its kernel does.
        return torch.addcmul(gathered(bias, columns), x_hat, gathered(weight, columns))

    return [u, mean, rstd, weight, bias], columns_of


_READINGS: dict[str, Callable[[Any, Tensor], _Reading]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    **dict.fromkeys(("ReluBackward0", "TanhBackward0", "SigmoidBackward0"), _result),
}
