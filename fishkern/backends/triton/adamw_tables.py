"""The table of addresses by which one launch finds its tensors, kept from step to step.

What a table is made from is compared at every call, since tensors may move or change: their
addresses, sizes and dtypes, read from whole lists at a time. Where all is as it was, nothing else
is done for a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fishkern.backends.triton.launch import num_multiprocessors

BLOCK = 1024  # entries that a program updates at a time
PROGRAMS_PER_MULTIPROCESSOR = 32

# The table's rows: addresses, the number of selected entries, the tensor's place in the lists;
# and where the moments are bytes, the addresses of their scales.
PARAM, GRAD, INDEX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
MASTER, COUNT, PLACE = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = tl.constexpr(9), tl.constexpr(10)


class Kind(NamedTuple):
    """What the tensors of one launch have in common."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    index_dtype: torch.dtype
    whole: bool  # every entry is selected, and there are no indices
    grad_selected: bool  # the gradient holds the selected entries only
    has_master: bool


class Tables(NamedTuple):
    """What a launch reads to find its tensors, on the device."""

    kind: Kind
    table: Tensor  # int64 [9 or 11, num_tensors]
    programs: Tensor  # int64 [2, num_programs]: tensor, and which range of its entries
    entries_per_program: int
    host: Tensor  # the copy's source, which must live as long as the copy may run


class Tensors(NamedTuple):
    """All that a launch depends on of a list of tensors."""

    addresses: tuple[int, ...]
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Operands(NamedTuple):
    """Of every list of the op. An empty one has no tensors, one without values none there."""

    params: Tensors
    grads: Tensors
    indices: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    max_exp_avg_sqs: Tensors
    masters: Tensors
    exp_avg_scales: Tensors
    exp_avg_sq_scales: Tensors


class Packed(NamedTuple):
    """All that a launch depends on of one tensor that holds those of a list."""

    address: int
    dtype: torch.dtype

    def split(self, counts: Sequence[int]) -> Tensors:
        """The list's tensors, of so many numbers each."""
        starts = accumulate(counts[:-1], initial=0)
        addresses = tuple(self.address + self.dtype.itemsize * start for start in starts)
        return Tensors(addresses, tuple(counts), (self.dtype,) * len(counts))


NOTHING = Tensors((), (), ())
_dtype = attrgetter("dtype")
_captured: list[Tables] = []  # a CUDA graph copies and reads its tables at each replay


def describe(tensors: Sequence[Tensor]) -> Tensors:
    """All of a list at a time: hundreds of tensors take microseconds."""
    return Tensors(
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.numel, tensors)),
        tuple(map(_dtype, tensors)),
    )


def describe_packed(tensor: Tensor | None) -> Packed | None:
    """None where there is none."""
    return None if tensor is None else Packed(tensor.data_ptr(), tensor.dtype)


def tables_of(device: torch.device, operands: Operands) -> list[Tables]:
    """Tables for lists of tensors, by kind."""
    return _kept(device, _build, operands)


def tables_of_packed(
    device: torch.device,
    params: Tensors,
    grads: Tensors,
    counts: tuple[int, ...],
    *packed: Packed | None,
) -> list[Tables]:
    """Tables for state in one tensor of each kind.

    Args:
        device: Where all is.
        params: The parameters.
        grads: Their gradients.
        counts: How many entries each of them has.
        packed: indices, exp_avg, exp_avg_sq, max_exp_avg_sq, master.
    """
    return _kept(device, _build_packed, params, grads, counts, *packed)


def _kept(device: torch.device, build: Any, *key: Any) -> list[Tables]:
    """Tables are kept from call to call: they depend on nothing but the key."""
    if device.type != "cuda":
        return build(device, *key)
    if torch.cuda.is_current_stream_capturing():
        found = build(device, *key)
        _captured.extend(found)
        return found
    # Only on the stream that filled them may tables be read without waiting.
    return _of_stream(torch.cuda.current_stream(device).cuda_stream, device, build, *key)


@lru_cache(maxsize=32)
def _of_stream(stream: int, device: torch.device, build: Any, *key: Any) -> list[Tables]:
    return build(device, *key)


def _build_packed(
    device: torch.device,
    params: Tensors,
    grads: Tensors,
    counts: tuple[int, ...],
    indices: Packed,
    *state: Packed | None,
) -> list[Tables]:
    stored = [0 if n == size else n for n, size in zip(counts, params.numels, strict=True)]
    lists = [NOTHING if packed is None else packed.split(counts) for packed in state]
    return _build(device, Operands(params, grads, indices.split(stored), *lists, NOTHING, NOTHING))


def _build(device: torch.device, operands: Operands) -> list[Tables]:
    """Sort the tensors by kind, and lay out a table for each."""
    params, grads, indices, exp_avgs, exp_avg_sqs, maxima, masters, *scales = operands
    rows: dict[Kind, list[tuple[int, ...]]] = {}
    for i, count in enumerate(exp_avgs.numels):
        if count == 0:
            continue
        whole = indices.numels[i] == 0
        has_master = bool(masters.numels) and masters.numels[i] > 0
        kind = Kind(
            params.dtypes[i],
            grads.dtypes[i],
            exp_avgs.dtypes[i],
            torch.int64 if whole else indices.dtypes[i],
            whole,
            whole or grads.numels[i] == count,
            has_master,
        )
        addresses = [t.addresses[i] for t in (params, grads, indices, exp_avgs, exp_avg_sqs)]
        addresses += [t.addresses[i] if t.addresses else 0 for t in (maxima, masters)]
        narrow = [t.addresses[i] for t in scales if t.addresses]
        rows.setdefault(kind, []).append((*addresses, count, i, *narrow))
    return [_lay_out(device, kind, of_kind) for kind, of_kind in rows.items()]


def _lay_out(device: torch.device, kind: Kind, rows: list[tuple[int, ...]]) -> Tables:
    """Share the rows' entries out among programs, and copy both tables to the device at once."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").T
    counts = table[COUNT.value]
    # Enough programs to fill the device; beyond that, longer ones rather than longer tables.
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device)
    entries_per_program = BLOCK * max(1, int(counts.sum()) // (BLOCK * wanted))
    programs = -(-counts // entries_per_program)
    before = (programs.cumsum(0) - programs).repeat_interleave(programs)
    tensor = torch.arange(len(rows), device="cpu").repeat_interleave(programs)
    ranges = torch.stack([tensor, torch.arange(len(tensor), device="cpu") - before])
    host = torch.cat([table.reshape(-1), ranges.view(-1)])
    if device.type == "cuda":
        host = host.pin_memory()
    packed = host.to(device, non_blocking=True)
    split = table.numel()
    return Tables(
        kind,
        packed[:split].view(table.shape),
        packed[split:].view(2, -1),
        entries_per_program,
        host,
    )
