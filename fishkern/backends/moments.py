"""Moments in fewer bits: how they are stored, and what is read back.

Adam's second moment changes by a share ``1 - beta2`` = 1e-3 a step. Fewer bits resolve less, so
rounded to nearest it would not change at all. Here a value is rounded up or down at random, with
the probabilities that give the right mean, and small changes add up. The random number is a hash
of the step and of the entry's place in its tensor's list: it takes no state, and the result depends
neither on the run nor on how the work is shared out.

bfloat16 keeps the upper half of float32. In 8 bits, ``BLOCK`` entries in a row share a power of two
(as in the OCP microscaling formats, 2023), and each has a small floating-point number of its own,
with four bits of mantissa, subnormals, and as exponents the last few below the block's largest: 8
for first moments, which have a sign, and 16 for second moments, which do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # entries that share a scale
MANTISSA = 4  # bits
DROPPED = 23 - MANTISSA  # bits of float32's mantissa that are rounded away
SIGNED_TOP, UNSIGNED_TOP = 7, 15  # the largest exponent field of a first and a second moment
NOT_FINITE = 255  # the scale of a block with an infinity or NaN, which is read as NaN everywhere
WORD = 0xFFFFFFFF


def noise(count: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """16 random bits for the first and for the second moment of each entry, as int64.

    A 32-bit hash (MurmurHash3's finalizer, Appleby 2011) of step and entry, cut in two.
    """
    bits = torch.arange(count, dtype=torch.int64, device=device) + step * 0x9E3779B1 & WORD
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & WORD
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & WORD
    bits = bits ^ bits >> 16
    return bits >> 16, bits & 0xFFFF


def widen(stored: Tensor, scale: Tensor | None, signed: bool) -> Tensor:
    """The stored moments in float32, exactly.

    Args:
        stored: bfloat16, or uint8 with ``scale``; any shape, contiguous.
        scale: uint8, one for each ``BLOCK`` entries: float32's exponent field of the block.
        signed: Whether these are first moments.
    """
    if scale is None:
        return stored.float()
    code, top = stored.reshape(-1).long(), SIGNED_TOP if signed else UNSIGNED_TOP
    shared = _by_entry(scale.long(), code.numel())
    magnitude = code & 0x7F if signed else code
    field = magnitude >> MANTISSA
    mantissa = (magnitude & 15) + torch.where(field > 0, 16, 0)
    exponent = field.clamp(min=1) + shared - top - MANTISSA  # below float32's: zero
    power = (exponent.clamp(min=0) << 23).int().view(torch.float32)
    value = mantissa.float() * power
    value = torch.where(shared == NOT_FINITE, torch.nan, value)
    value = torch.where(code > 0x7F, -value, value) if signed else value
    return value.view(stored.shape)


def narrow_(value: Tensor, stored: Tensor, scale: Tensor | None, signed: bool, up: Tensor) -> None:
    """Store float32 moments, the other way round.

    A positive second moment is never stored as zero, since the update divides by its root.

    Args:
        value: float32, of the shape of ``stored``.
        stored: Written: bfloat16, or uint8 with ``scale``.
        scale: Written: uint8, one for each ``BLOCK`` entries.
        signed: Whether these are first moments.
        up: int64, for each entry the odds of rounding up, in units of 2^-16.
    """
    value = value.reshape(-1)
    bits = value.view(torch.int32).long() & WORD
    if scale is None:
        upper = torch.where(value.isnan(), 0x7FC0, bits + up >> 16)
        upper = torch.where(upper > 0x7FFF, upper - 0x10000, upper).to(torch.int16)
        stored.copy_(upper.view(torch.bfloat16).view(stored.shape))
        return
    magnitude, top = bits & 0x7FFFFFFF, SIGNED_TOP if signed else UNSIGNED_TOP
    # The exponent of the largest value after rounding it up: no rounding leaves the range.
    padded = torch.nn.functional.pad(magnitude, (0, -len(magnitude) % BLOCK)).view(-1, BLOCK)
    largest = padded.amax(1) if padded.numel() else padded.new_empty(0)
    scale.copy_((largest + (1 << DROPPED) - 1 >> 23).clamp(max=NOT_FINITE))
    shared = _by_entry(scale.long(), len(magnitude))
    exponent = magnitude >> 23
    relative = exponent - shared + top
    field = relative.clamp(min=1)  # below: subnormal, with the same unit as field 1
    shift = DROPPED + field - relative
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    within = shift.clamp(max=31)
    code = (field - 1 << MANTISSA) + (mantissa + (up << within - 16) >> within)
    code = torch.where((shift > 31) | (exponent == 0), 0, code)
    if signed:
        code = code + (bits >> 24 & 0x80)
    else:
        code = torch.where((code == 0) & (exponent > 0), 1, code)
    code = torch.where(shared == NOT_FINITE, 0, code)
    stored.copy_(code.view(stored.shape))


def _by_entry(scale: Tensor, count: int) -> Tensor:
    """Each block's scale, repeated for its entries."""
    return scale.repeat_interleave(BLOCK)[:count]
