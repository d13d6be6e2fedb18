"""What made a layer's input, where its maker keeps that for its own backward pass anyhow.

An activation function, a product and a norm keep what they read, or what they made. Then nothing of
their result has to be kept for a layer that reads it: in the backward pass the columns that its
selected entries need are made again, of the same columns of what is kept.

    gelu, silu    x = f(h)                      h is kept
    relu, ...     x                             x itself
    LayerNorm     x = (u - mean) rstd w + b     all of these
    a product     x = a b                       the factors that the other's gradient needs

Both factors of a gated MLP are kept. One that is not may be made again itself: a frozen RMSNorm's
``x = w (h r)`` keeps w, h and r, a dropout's ``x = f(h) m`` keeps m and h.
"""

from __future__ import annotations

import functools
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
    if node.name() not in _READINGS:
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    try:
        found = _read(node, x.shape[-1])
    except RuntimeError:  # freed, or written to, which the maker's backward alone would mind
        return None
    if found is None:
        return None
    tensors, columns = found
    # Without their graphs: that the maker's is there is the maker's business.
    return Made(node.name(), [tensor.detach() for tensor in tensors], columns)


def gathered(x: Tensor, columns: Tensor | None) -> Tensor:
    """``x[..., columns]``, or x, by torch's faster way, which is for matrices."""
    if columns is None:
        return x
    if x.dim() < 3:
        return x.index_select(-1, columns)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat.index_select(1, columns).view(*x.shape[:-1], columns.numel())


_Reading = tuple[Sequence[Tensor], Callable[..., Tensor]]  # as in Made


def _read(node: Any, width: int) -> _Reading | None:
    """How columns of what a node made, ``[*, width]``, can be made again."""
    reading = None if node is None else _READINGS.get(node.name())
    if reading is None or tuple(node._input_metadata[0].shape[-1:]) != (width,):
        return None
    return None if _is_packed(node) else reading(node, width)


def _is_packed(node: Any) -> bool:
    """Whether what a node keeps is there in another form alone: in a checkpoint, or offloaded."""
    kind: Any = type(node)
    return any(getattr(node, name).unpack_hook is not None for name in _kept_names(kind))


@functools.cache
def _kept_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _gelu(node: Any, width: int) -> _Reading:
    kind = node._saved_approximate
    return [node._saved_self], lambda columns, h: F.gelu(gathered(h, columns), approximate=kind)


def _silu(node: Any, width: int) -> _Reading:
    return [node._saved_self], lambda columns, h: F.silu(gathered(h, columns))


def _result(node: Any, width: int) -> _Reading:
    return [node._saved_result], lambda columns, x: gathered(x, columns)


def _layer_norm(node: Any, width: int) -> _Reading | None:
    u, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    weight, bias = node._saved_weight, node._saved_bias
    if weight is None or bias is None:
        return None
    if not u.dtype == mean.dtype == weight.dtype == torch.float32:  # narrower ones were rounded
        return None

    def columns_of(columns: Tensor | None, *tensors: Tensor) -> Tensor:
        u, mean, rstd, weight, bias = tensors
        x_hat = (gathered(u, columns) - mean).mul_(rstd)
        # Rounded as its kernel does.
        return torch.addcmul(gathered(bias, columns), x_hat, gathered(weight, columns))

    return [u, mean, rstd, weight, bias], columns_of


def _product(node: Any, width: int) -> _Reading | None:
    (one, _), (other, _) = node.next_functions
    left = _factor(node._saved_self, one, width)
    right = _factor(node._saved_other, other, width)
    if left is None or right is None:
        return None
    (mine, make), (yours, make_other) = left, right

    def columns_of(columns: Tensor | None, *tensors: Tensor) -> Tensor:
        number = len(tensors) - others
        return make(columns, *tensors[:number]) * make_other(columns, *tensors[number:])

    others = len(yours)
    return [*mine, *yours], columns_of


def _factor(saved: Tensor | None, maker: Any, width: int) -> _Reading | None:
    if saved is None:
        return _read(maker, width)
    if saved.dim() and saved.shape[-1] == width:
        return [saved], lambda columns, a: gathered(a, columns)
    return [saved], lambda columns, a: a  # the same for all features


def _cast(node: Any, width: int) -> _Reading | None:
    found, dtype = _read(node.next_functions[0][0], width), node._input_metadata[0].dtype
    if found is None:
        return None
    tensors, make = found
    return tensors, lambda columns, *tensors: make(columns, *tensors).to(dtype)


_READINGS: dict[str, Callable[[Any, int], _Reading | None]] = {
    "GeluBackward0": _gelu,
    "SiluBackward0": _silu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    "ToCopyBackward0": _cast,
    **dict.fromkeys(("ReluBackward0", "TanhBackward0", "SigmoidBackward0"), _result),
}
