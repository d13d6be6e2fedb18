"""Every kernel variant that the launchers use, for ahead-of-time compilation (``aot.py``).

The ops are called on meta tensors, inside ``collect()``, which notes what they would launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fishkern.backends.triton.adamw import masked_adamw_
from fishkern.backends.triton.adamw_quantized import masked_adamw_quantized_
from fishkern.backends.triton.conv import conv_fisher_
from fishkern.backends.triton.embedding import embedding_fisher_
from fishkern.backends.triton.launch import Launch, collect
from fishkern.backends.triton.linear import linear_fisher_
from fishkern.backends.triton.norm import norm_fisher_
from fishkern.backends.triton.selected_grad import linear_selected_grad_

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def variants(quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """A name and a launch for each variant; with ``quick`` one or two of each kernel."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    # Layers [O, I] that take each tile; tokens that take each step, and T = 1.
    layers = [(4096, 4096), (16, 4096), (4096, 16), (32, 4096), (4096, 32), (64, 4096), (4096, 64)]
    if quick:
        yield _fisher(4096, 4096, 512, bf16, bf16)
        yield _fisher(16, 4096, 16, f32, f32, bias=True, scores=True)
        yield _adamw(bf16, f32, torch.int32, masters=True)
        yield _adamw(bf16, f32, torch.int32, masters=True, moments=torch.uint8)
        yield _embedding(bf16, scores=True)
        yield _norm(bf16, bf16, scores=True)
        yield _selected_grad((4096, 4096), bf16, bf16)
        yield _conv(256, 256, (3, 3), bf16, scores=True)
        return
    for size_o, size_i in layers:
        for dtype in (bf16, f16, f32):
            yield _fisher(size_o, size_i, 512, dtype, dtype)
            yield _fisher(size_o, size_i, 512, dtype, dtype, bias=True, scores=True)
            yield _fisher(size_o, size_i, 16, dtype, dtype)
    for dtype in (bf16, f16, f32):
        yield _fisher(4096, 4096, 1, dtype, dtype, bias=True)
        yield _fisher(4096, 4096, 32, dtype, dtype)
        yield _fisher(4096, 4096, 512, dtype, dtype, bias=True)
        yield _fisher(4096, 4096, 16, dtype, dtype, bias=True)
        yield _fisher(4095, 4093, 512, dtype, dtype, bias=True, scores=True)
        yield _fisher(2, 384, 512, dtype, dtype, bias=True)
        yield _fisher(50257, 768, 512, dtype, dtype)
        yield _fisher(4096, 4096, 512, dtype, dtype, transposed=True)
    yield _fisher(4096, 4096, 512, f32, bf16, bias=True)
    yield _fisher(4096, 4096, 512, bf16, f16, bias=True)

    for dtype in (bf16, f16, f32):
        for scores in (False, True):
            yield _embedding(dtype, scores)
            yield _embedding(dtype, scores, size=769)
            yield _norm(dtype, dtype, scores)
            yield _norm(dtype, dtype, scores, size=4093)
        yield _norm(None, dtype)
        yield _norm(dtype, dtype, bias=False)
    yield _norm(f32, bf16, scores=True)

    for dtype in (bf16, f16, f32):
        for scores in (False, True):
            yield _conv(256, 256, (3, 3), dtype, scores)  # a residual network's
            yield _conv(8, 256, (3, 3), dtype, scores)  # an adapter's
            yield _conv(256, 8, (1, 1), dtype, scores)
            yield _conv(32, 256, (3, 3), dtype, scores)
            yield _conv(64, 64, (3, 3), dtype, scores)
            yield _conv(256, 256, (3, 3), dtype, scores, groups=256)
            yield _conv(512, 512, (3,), dtype, scores, stride=2)  # of sound
            yield _conv(64, 3, (7, 7), dtype, scores, stride=2)
        yield _conv(768, 3, (16, 16), dtype, stride=16)  # patches
        yield _conv(64, 64, (3, 3, 3), dtype, scores=True)
    yield _conv(256, 256, (3, 3), f32, scores=True, grad_dtype=bf16)

    for dtype in (bf16, f16, f32):
        for shape in [(4096, 4096), (16, 4096), (4096, 16), (32, 4096), (4096, 32), (4095, 4093)]:
            yield _selected_grad(shape, dtype, dtype)
        for options in ({"rows": True}, {"columns": True}, {"split": True}, {"index": torch.int64}):
            yield _selected_grad((4096, 4096), dtype, dtype, **options)
        yield _selected_grad((4096, 24), dtype, dtype, columns=True, split=True)
    yield _selected_grad((4096, 4096), f32, bf16)

    for param, grad in ((f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f16, f32)):
        for index in (torch.int32, torch.int64):
            yield _adamw(param, grad, index)
            yield _adamw(param, grad, index, masters=param != f32, selected=True, scaler=True)
        yield _adamw(param, grad, None, amsgrad=True, scaler=True)
        for moments in (bf16, torch.uint8):
            yield _adamw(param, grad, torch.int32, moments=moments)
            yield _adamw(param, grad, torch.int64, selected=True, scaler=True, moments=moments)
            yield _adamw(param, grad, None, masters=param != f32, moments=moments)


def _fisher(
    size_o: int,
    size_i: int,
    num_tokens: int,
    x_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    bias: bool = False,
    scores: bool = False,
    transposed: bool = False,
) -> tuple[str, Launch]:
    """What ``linear_fisher_`` launches; ``scores`` with a mask, ``transposed`` tokens last."""

    def operand(size: int, dtype: torch.dtype) -> Tensor:
        if transposed:
            return _meta(32, size, num_tokens, dtype=dtype).transpose(1, 2)
        return _meta(32, num_tokens, size, dtype=dtype)

    with collect() as launches:
        linear_fisher_(
            _meta(size_o, size_i),
            operand(size_i, x_dtype),
            operand(size_o, grad_dtype),
            bias_fisher=_meta(size_o) if bias else None,
            sample_scores=_meta(32) if scores else None,
            mask=_meta(size_o, size_i, dtype=torch.bool) if scores else None,
        )
    options = [name for name, on in (("bias", bias), ("scores", scores)) if on]
    layout = ["transposed"] if transposed else []
    words = [f"[{size_o},{size_i}]", f"T={num_tokens}", TYPES[x_dtype], TYPES[grad_dtype]]
    return " ".join(["fisher", *words, *options, *layout]), launches[0]


def _embedding(
    grad_dtype: torch.dtype, scores: bool = False, size: int = 768
) -> tuple[str, Launch]:
    """What ``embedding_fisher_`` launches; ``scores`` with a mask."""
    with collect() as launches:
        embedding_fisher_(
            _meta(50257, size),
            _meta(32, 512, dtype=torch.int64),
            _meta(32, 512, size, dtype=grad_dtype),
            sample_scores=_meta(32) if scores else None,
            mask=_meta(50257, size, dtype=torch.bool) if scores else None,
        )
    words = ["embedding", f"[50257,{size}]", TYPES[grad_dtype], *(["scores"] if scores else [])]
    return " ".join(words), launches[0]


def _norm(
    x_dtype: torch.dtype | None,
    grad_dtype: torch.dtype,
    scores: bool = False,
    bias: bool = True,
    size: int = 4096,
) -> tuple[str, Launch]:
    """What ``norm_fisher_`` launches; without a dtype of x_hat for the bias alone."""
    weight = x_dtype is not None
    mask = _meta(size, dtype=torch.bool) if scores else None
    with collect() as launches:
        norm_fisher_(
            _meta(size) if weight else None,
            _meta(size) if bias else None,
            _meta(32, 512, size, dtype=x_dtype) if weight else None,
            _meta(32, 512, size, dtype=grad_dtype),
            sample_scores=_meta(32) if scores else None,
            weight_mask=mask,
            bias_mask=mask,
        )
    flags = {"weight": weight, "bias": bias, "scores": scores}
    words = [TYPES[x_dtype] if x_dtype else "none", TYPES[grad_dtype]]
    return " ".join(
        ["norm", f"[{size}]", *words, *(name for name, on in flags.items() if on)]
    ), launches[0]


def _selected_grad(
    shape: tuple[int, int],
    x_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    index: torch.dtype = torch.int32,
    rows: bool = False,
    columns: bool = False,
    split: bool = False,
) -> tuple[str, Launch]:
    """What ``linear_selected_grad_`` launches; rows or columns of larger operands, or all."""
    size_o, size_i = shape
    with collect() as launches:
        linear_selected_grad_(
            _meta(10_000),
            _meta(32, 512, 8192 if columns else size_i, dtype=x_dtype),
            _meta(32, 512, 8192 if rows else size_o, dtype=grad_dtype),
            _meta(10_000, dtype=index),
            rows=_meta(size_o, dtype=index) if rows else None,
            columns=_meta(size_i, dtype=index) if columns else None,
            splits=4 if split else 1,
        )
    flags = {"rows": rows, "columns": columns, "split": split}
    types = [TYPES[x_dtype], TYPES[grad_dtype], TYPES[index]]
    words = [f"[{size_o},{size_i}]", *types, *(name for name, on in flags.items() if on)]
    return " ".join(["selected", *words]), launches[0]


def _conv(
    outputs: int,
    channels: int,
    kernel: tuple[int, ...],
    x_dtype: torch.dtype,
    scores: bool = False,
    groups: int = 1,
    stride: int = 1,
    grad_dtype: torch.dtype | None = None,
) -> tuple[str, Launch]:
    """What ``conv_fisher_`` launches for its weights; ``scores`` with a mask."""
    dims, size = len(kernel), 64
    padding = [k // 2 if stride < k else 0 for k in kernel]
    positions = [(size + 2 * p - k) // stride + 1 for p, k in zip(padding, kernel, strict=True)]
    weight = (outputs, channels // groups, *kernel)
    grad_dtype = grad_dtype or x_dtype
    with collect() as launches:
        conv_fisher_(
            _meta(*weight),
            _meta(32, channels, *[size] * dims, dtype=x_dtype),
            _meta(32, outputs, *positions, dtype=grad_dtype),
            stride=[stride] * dims,
            padding=padding,
            dilation=[1] * dims,
            groups=groups,
            sample_scores=_meta(32) if scores else None,
            mask=_meta(*weight, dtype=torch.bool) if scores else None,
        )
    words = [str(list(weight)).replace(" ", ""), f"stride={stride}", f"groups={groups}"]
    types = [TYPES[x_dtype], TYPES[grad_dtype], *(["scores"] if scores else [])]
    return " ".join(["conv", *words, *types]), launches[0]


def _adamw(
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    index_dtype: torch.dtype | None,
    masters: bool = False,
    selected: bool = False,
    amsgrad: bool = False,
    scaler: bool = False,
    moments: torch.dtype = torch.float32,
) -> tuple[str, Launch]:
    """What the AdamW ops launch; without an index dtype every entry is selected."""
    size = 65536
    count = size if index_dtype is None else size // 16
    tensors = (
        [_meta(size, dtype=param_dtype)],
        [_meta(count if selected else size, dtype=grad_dtype)],
        [_meta(0 if index_dtype is None else count, dtype=index_dtype or torch.int64)],
        [_meta(count, dtype=moments)],
        [_meta(count, dtype=moments)],
    )
    master = [_meta(count)] if masters else []
    options: dict[str, Any] = {
        "steps": torch.ones(1),
        "lr": torch.tensor(1e-3, dtype=torch.float64),
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "maximize": amsgrad,
        "grad_scale": _meta() if scaler else None,
        "found_inf": _meta() if scaler else None,
    }
    with collect() as launches:
        if moments == torch.float32:
            masked_adamw_(*tensors, [_meta(count)] if amsgrad else [], master, **options)
        else:
            scales = [_meta(count // 32, dtype=moments)] if moments == torch.uint8 else []
            masked_adamw_quantized_(*tensors, scales, scales, master, **options)
    flags = {"masters": masters, "selected": selected, "amsgrad": amsgrad, "scaler": scaler}
    words = [TYPES[param_dtype], TYPES[grad_dtype], TYPES[index_dtype] if index_dtype else "whole"]
    words += [] if moments == torch.float32 else [f"moments={TYPES[moments]}"]
    return " ".join(["adamw", *words, *(name for name, on in flags.items() if on)]), launches[0]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
