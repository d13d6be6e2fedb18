"""Compile every kernel variant ahead of time, without a GPU, and refuse spilled registers.

``python -m fishkern.backends.triton.aot`` calls the ops on meta tensors, compiles what they
would launch for each GPU architecture, and reads registers, stack and shared memory from the
machine code. A variant that fails to compile, spills (its registers overflow into memory), or
needs more shared memory than every GPU has, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fishkern.backends.triton import INTERPRETED
from fishkern.backends.triton.adamw import masked_adamw_
from fishkern.backends.triton.conv import conv_fisher_
from fishkern.backends.triton.embedding import embedding_fisher_
from fishkern.backends.triton.launch import Launch, collect
from fishkern.backends.triton.linear import linear_fisher_
from fishkern.backends.triton.norm import norm_fisher_
from fishkern.backends.triton.selected_grad import linear_selected_grad_

ARCHITECTURES = (80, 90)
SHARED_LIMIT = 99 * 1024  # bytes: what a program may use on the smallest GPUs since Ampere
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def variants(quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """A name and a launch for each variant that the launchers use: the table of this module."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    # Layers [O, I] that take each tile; tokens that take each step, and T = 1.
    layers = [(4096, 4096), (16, 4096), (4096, 16), (32, 4096), (4096, 32), (64, 4096), (4096, 64)]
    if quick:
        yield _fisher(4096, 4096, 512, bf16, bf16)
        yield _fisher(16, 4096, 16, f32, f32, bias=True, scores=True)
        yield _adamw(bf16, f32, torch.int32, masters=True)
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
) -> tuple[str, Launch]:
    """What ``masked_adamw_`` launches; without an index dtype every entry is selected."""
    size = 65536
    count = size if index_dtype is None else size // 16
    moments = [_meta(count) for _ in range(4)]
    with collect() as launches:
        masked_adamw_(
            [_meta(size, dtype=param_dtype)],
            [_meta(count if selected else size, dtype=grad_dtype)],
            [_meta(0 if index_dtype is None else count, dtype=index_dtype or torch.int64)],
            [moments[0]],
            [moments[1]],
            [moments[2]] if amsgrad else [],
            [moments[3]] if masters else [],
            torch.ones(1),
            torch.tensor(1e-3, dtype=torch.float64),
            0.9,
            0.999,
            1e-8,
            1e-2,
            maximize=amsgrad,
            grad_scale=_meta() if scaler else None,
            found_inf=_meta() if scaler else None,
        )
    flags = {"masters": masters, "selected": selected, "amsgrad": amsgrad, "scaler": scaler}
    words = [TYPES[param_dtype], TYPES[grad_dtype], TYPES[index_dtype] if index_dtype else "whole"]
    return " ".join(["adamw", *words, *(name for name, on in flags.items() if on)]), launches[0]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def source(launch: Launch) -> ASTSource:
    """The launch as source to compile, its arguments specialised as Triton's launcher does.

    Constants, None and integers equal to 1 are compiled in; addresses and integers that are
    multiples of 16 are promised to be.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        by_value = not param.do_not_specialize
        aligned = by_value and not param.do_not_specialize_on_alignment
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and by_value):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[param.name], aligned = "fp32", False
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = aligned and value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


class Usage(NamedTuple):
    """What one variant takes on one architecture."""

    name: str
    architecture: int
    registers: int = 0
    stack: int = 0  # bytes per thread, spilled registers among them
    shared: int = 0  # bytes per program
    seconds: float = 0.0
    error: str = ""


def measure(number: int, architecture: int, quick: bool) -> Usage:
    """Compile one variant of the table and read its resources from the machine code."""
    name, launch = list(variants(quick))[number]
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options
        )
        usage = _resources(compiled.asm["cubin"])
    except Exception as error:  # every variant is to be reported, whatever befell it
        return Usage(name, architecture, error=f"{type(error).__name__}: {error}")
    shared, seconds = compiled.metadata.shared, time.perf_counter() - start
    stack = usage["STACK"] + usage["LOCAL"]
    problems = []
    if stack > 0:
        problems.append(f"spills {stack} bytes per thread")
    if shared > SHARED_LIMIT:
        problems.append(f"needs {shared} bytes of shared memory, {SHARED_LIMIT} are there")
    return Usage(
        name, architecture, usage["REG"], stack, shared, seconds, error="; ".join(problems)
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on, of the one function in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", listing)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise RuntimeError(f"no resource usage in cuobjdump's listing: {listing!r}")
    return usage


def _cuobjdump() -> str:
    """The tool that triton's package carries, else the one on the PATH."""
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(carried) if carried.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump is neither in triton's package nor on the PATH")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line per variant and architecture, and count the failures."""
    parser = argparse.ArgumentParser(
        prog="python -m fishkern.backends.triton.aot",
        description="Compile every Triton kernel without a GPU.",
    )
    parser.add_argument("--quick", action="store_true", help="three variants only")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=ARCHITECTURES,
        help="compute capabilities, 80 90 100 120 (default: 80 90)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it")

    names = [name for name, _ in variants(options.quick)]
    jobs = [(i, arch, options.quick) for arch in options.arch for i in range(len(names))]
    width = max(map(len, names))
    print(f"{'':9} {'variant':{width}} arch  registers  stack  shared  seconds")
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        results = pool.map(measure, *zip(*jobs, strict=True))
        for done, usage in enumerate(results, 1):
            failed += bool(usage.error)
            print(
                f"{done:4}/{len(jobs):<4} {usage.name:{width}} {usage.architecture:4} "
                f"{usage.registers:10} {usage.stack:6} {usage.shared:7} {usage.seconds:8.1f}"
                f"{'  FAILED: ' + usage.error if usage.error else ''}",
                flush=True,
            )
    print(f"{len(jobs)} compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
