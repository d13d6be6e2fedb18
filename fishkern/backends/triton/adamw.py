"""AdamW on the selected entries of a list of tensors, in one launch for each kind of tensor.

A launch finds its tensors through a table of addresses in device memory, so that a model's
hundreds of parameters cost one launch for each combination of dtypes and layouts: usually one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishkern.backends.packed import by_lists, raised
from fishkern.backends.triton.adamw_tables import (
    BLOCK,
    COUNT,
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    EXP_AVG_SQ_SCALE,
    GRAD,
    INDEX,
    MASTER,
    MAX_EXP_AVG_SQ,
    PARAM,
    PLACE,
    Operands,
    Tables,
    describe,
    describe_packed,
    tables_of,
    tables_of_packed,
)
from fishkern.backends.triton.launch import Launch, run
from fishkern.backends.triton.moments import load_moment, noise, store_moment

FLOAT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MOMENT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}
INDEX_DTYPES = {torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit
def _one_minus_power(log_base, exponent):
    """1 - base^exponent in float32, to a few units in the last place: no cancellation."""
    y = exponent * log_base
    small = tl.maximum(y, -0.5)
    series = 1.0  # (exp(small) - 1) / small, by Horner's rule
    for k in tl.static_range(9, 1, -1):
        series = 1.0 + series * small / k
    return tl.where(y > -0.5, -small * series, 1.0 - tl.exp(y))


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """Float32 to ``dtype``, to nearest, ties to even."""
    if dtype == tl.bfloat16:  # spelled out because the interpreter would truncate
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # a NaN's bits could round to infinity's
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def _address(table_ptr, ROW: tl.constexpr, tensor, num_tensors, DTYPE: tl.constexpr):
    """One row's entry for a tensor, as a pointer."""
    return tl.load(table_ptr + ROW * num_tensors + tensor).to(tl.pointer_type(DTYPE))


# Neither a change of the lists nor of where the scaler's scalars lie compiles the kernel anew.
@triton.jit(
    do_not_specialize=["num_tensors", "num_programs", "entries_per_program"],
    do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"],
)
def _masked_adamw_kernel(
    table_ptr,
    programs_ptr,
    scalars_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    num_tensors,
    num_programs,
    entries_per_program,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    GRAD_SELECTED: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One AdamW step (the formula is the reference's) on a range of one tensor's entries.

    Program j serves tensor ``programs_ptr[0, j]``, whose entries it takes from
    ``programs_ptr[1, j] * entries_per_program`` on; ``table_ptr`` is [9 or 11, num_tensors].
    ``scalars_ptr`` holds the learning rate and then the step of every tensor in the lists.
    Computes in float32; parameters are touched at the selected positions only.
    """
    if found_inf_ptr is not None:  # noqa: SIM102 (decided when compiling)
        if tl.load(found_inf_ptr) != 0.0:
            return
    program = tl.program_id(0)
    tensor = tl.load(programs_ptr + program)
    first = tl.load(programs_ptr + num_programs + program) * entries_per_program
    count = tl.load(table_ptr + COUNT * num_tensors + tensor)
    place = tl.load(table_ptr + PLACE * num_tensors + tensor)
    param_ptr = _address(table_ptr, PARAM, tensor, num_tensors, PARAM_DTYPE)
    grad_ptr = _address(table_ptr, GRAD, tensor, num_tensors, GRAD_DTYPE)
    exp_avg_ptr = _address(table_ptr, EXP_AVG, tensor, num_tensors, MOMENT_DTYPE)
    exp_avg_sq_ptr = _address(table_ptr, EXP_AVG_SQ, tensor, num_tensors, MOMENT_DTYPE)
    m_scale_ptr = None
    v_scale_ptr = None
    if tl.uint8 == MOMENT_DTYPE:
        m_scale_ptr = _address(table_ptr, EXP_AVG_SCALE, tensor, num_tensors, tl.uint8)
        v_scale_ptr = _address(table_ptr, EXP_AVG_SQ_SCALE, tensor, num_tensors, tl.uint8)

    lr = tl.load(scalars_ptr)
    step = tl.load(scalars_ptr + 1 + place)
    decay = 1.0 - lr * weight_decay
    step_size = tl.div_rn(lr, _one_minus_power(log_beta1, step))
    root = tl.sqrt_rn(_one_minus_power(log_beta2, step))
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(tl.float32)

    for start in range(first, tl.minimum(first + entries_per_program, count), BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < count
        if WHOLE:
            where = entry
        else:
            index_ptr = _address(table_ptr, INDEX, tensor, num_tensors, INDEX_DTYPE)
            where = tl.load(index_ptr + entry, mask=inside, other=0).to(tl.int64)
        if HAS_MASTER:
            master_ptr = _address(table_ptr, MASTER, tensor, num_tensors, tl.float32)
            p = tl.load(master_ptr + entry, mask=inside, other=0.0)
        else:
            p = tl.load(param_ptr + where, mask=inside, other=0.0).to(tl.float32)
        g_entry = entry if GRAD_SELECTED else where
        g = tl.load(grad_ptr + g_entry, mask=inside, other=0.0).to(tl.float32)
        m = load_moment(exp_avg_ptr, m_scale_ptr, entry, inside, SIGNED=True)
        v = load_moment(exp_avg_sq_ptr, v_scale_ptr, entry, inside, SIGNED=False)
        v = tl.where(inside, v, 1.0)  # no 0 / 0 outside

        if grad_scale_ptr is not None:
            g = tl.div_rn(g, grad_scale)
        if MAXIMIZE:
            g = -g
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g * g
        if tl.float32 == MOMENT_DTYPE:
            tl.store(exp_avg_ptr + entry, m, mask=inside)
            tl.store(exp_avg_sq_ptr + entry, v, mask=inside)
        else:
            random = noise(step, entry)
            store_moment(exp_avg_ptr, m_scale_ptr, entry, inside, m, random >> 16, SIGNED=True)
            store_moment(
                exp_avg_sq_ptr, v_scale_ptr, entry, inside, v, random & 0xFFFF, SIGNED=False
            )
        if AMSGRAD:
            max_ptr = _address(table_ptr, MAX_EXP_AVG_SQ, tensor, num_tensors, tl.float32)
            v_max = tl.load(max_ptr + entry, mask=inside, other=1.0)
            v = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
            tl.store(max_ptr + entry, v, mask=inside)
        p = p * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        if HAS_MASTER:
            tl.store(master_ptr + entry, p, mask=inside)
        tl.store(param_ptr + where, _round_to(p, PARAM_DTYPE), mask=inside)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on the selected entries of every tensor, as the reference defines it.

    Parameters and gradients may be float32, bfloat16 or float16, in any mixture; moments and
    masters are float32. Nothing waits for the device. A parameter that is not contiguous is
    stepped in a contiguous copy, which is then written back.

    Raises:
        TypeError: A dtype that the kernel does not have.
        ValueError: Moments or masters that are not contiguous.
    """
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    wide = {"max_exp_avg_sqs": max_exp_avg_sqs, "masters": masters}
    check(params, grads, {**moments, **wide}, {})
    step_all(
        params, grads, indices, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, (), (), masters,
        steps, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf,
    )  # fmt: skip


def step_all(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    masters: Sequence[Tensor],
    *options: Any,
) -> None:
    """Launch the kernel for the checked tensors of each kind; ``options`` as ``launch_all``'s."""
    flat, grads, indices = (_contiguous(tensors) for tensors in (params, grads, indices))
    lists = (flat, grads, indices, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters)
    operands = Operands(*map(describe, (*lists, exp_avg_scales, exp_avg_sq_scales)))
    launch_all(tables_of(_device_of(params), operands), len(max_exp_avg_sqs) > 0, *options)
    for param, copy in zip(params, flat, strict=True):
        if copy is not param:
            param.detach().copy_(copy)


def launch_all(
    found: Sequence[Tables],
    amsgrad: bool,
    steps: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One launch for each table."""
    # One small copy where all is on the host; where it is not, nothing waits for the device.
    home = steps.device if steps.device.type != "cpu" else lr.device
    scalars = torch.cat([t.to(home, torch.float32).view(-1) for t in (lr, steps)])
    for tables in found:
        kind, device = tables.kind, tables.table.device
        args = {
            "table_ptr": tables.table,
            "programs_ptr": tables.programs,
            "scalars_ptr": scalars.to(device, non_blocking=True),
            "grad_scale_ptr": None if grad_scale is None else grad_scale.to(device),
            "found_inf_ptr": None if found_inf is None else found_inf.to(device),
            "num_tensors": tables.table.shape[1],
            "num_programs": tables.programs.shape[1],
            "entries_per_program": tables.entries_per_program,
            "beta1": beta1,
            "beta2": beta2,
            "one_minus_beta1": 1 - beta1,  # a difference in float32 would have lost digits
            "one_minus_beta2": 1 - beta2,
            "log_beta1": math.log(beta1) if beta1 else -math.inf,
            "log_beta2": math.log(beta2) if beta2 else -math.inf,
            "eps": eps,
            "weight_decay": weight_decay,
            "PARAM_DTYPE": FLOAT_DTYPES[kind.param_dtype],
            "GRAD_DTYPE": FLOAT_DTYPES[kind.grad_dtype],
            "MOMENT_DTYPE": MOMENT_DTYPES[kind.moment_dtype],
            "INDEX_DTYPE": INDEX_DTYPES[kind.index_dtype],
            "WHOLE": kind.whole,
            "GRAD_SELECTED": kind.grad_selected,
            "HAS_MASTER": kind.has_master,
            "AMSGRAD": amsgrad,
            "MAXIMIZE": maximize,
            "BLOCK": BLOCK,
        }
        run(Launch(_masked_adamw_kernel, (tables.programs.shape[1],), args, 8, 1), device)


_by_lists = by_lists(masked_adamw_)


def masked_adamw_packed_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Tensor,
    indices: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    master: Tensor | None,
    steps_before: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``masked_adamw_`` on packed state, without a view for each parameter."""
    state = (indices, exp_avg, exp_avg_sq, max_exp_avg_sq, master)
    options = (lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf)
    every = (*params, *grads, *(t for t in state if t is not None))
    if not all(map(Tensor.is_contiguous, every)):
        _by_lists(params, grads, offsets, *state, steps_before, *options)
        return
    wide = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    wide |= {} if max_exp_avg_sq is None else {"max_exp_avg_sq": max_exp_avg_sq}
    wide |= {} if master is None else {"master": master}
    check(params, grads, {name: [tensor] for name, tensor in wide.items()}, {})
    tables = tables_of_packed(
        _device_of(params), describe(params), describe(grads), tuple(offsets.diff().tolist()),
        *map(describe_packed, state),
    )  # fmt: skip
    steps = raised(steps_before, found_inf)
    launch_all(tables, max_exp_avg_sq is not None, steps, *options)
    steps_before.copy_(steps)


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def _device_of(params: Sequence[Tensor]) -> torch.device:
    """The one device of all parameters, by whose addresses a launch finds them."""
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(
            f"params are on {' and '.join(sorted(map(str, devices)))}: call the op for each device"
        )
    return params[0].device


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    wide: dict[str, Sequence[Tensor]],
    narrow: dict[str, Sequence[Tensor]],
) -> None:
    """Refuse what the kernel does not have: ``wide`` state is float32, ``narrow`` is not."""
    kinds = [
        ({"params": params, "grads": grads}, FLOAT_DTYPES, "takes float32, bfloat16 and float16"),
        (wide, [torch.float32], "keeps float32"),
        (narrow, [torch.bfloat16, torch.uint8], "keeps bfloat16 and uint8"),
    ]
    for lists, known, what in kinds:
        for name, tensors in lists.items():
            for dtype in {t.dtype for t in tensors}:
                if dtype not in known:
                    raise TypeError(
                        f"{name} has a tensor of dtype {dtype}: the triton backend {what}; "
                        f'use_backend("reference") runs every dtype'
                    )
    for name, tensors in (wide | narrow).items():
        if not all(map(Tensor.is_contiguous, tensors)):
            raise ValueError(f"{name} has a tensor that is not contiguous: pass contiguous ones")
