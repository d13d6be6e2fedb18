"""Moments in bfloat16 and in 8 bits, in a kernel: ``backends/moments.py`` says how and why.

The same bits come out as there. All of it is inlined into the kernel of ``adamw.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fishkern.backends import moments as storage

SCALE_BLOCK = tl.constexpr(storage.BLOCK)
MANTISSA = tl.constexpr(storage.MANTISSA)
DROPPED = tl.constexpr(storage.DROPPED)
ALMOST_ONE = tl.constexpr((1 << storage.DROPPED) - 1)  # unit of the largest mantissa, less a bit
SIGNED_TOP = tl.constexpr(storage.SIGNED_TOP)
UNSIGNED_TOP = tl.constexpr(storage.UNSIGNED_TOP)
NOT_FINITE = tl.constexpr(storage.NOT_FINITE)
INFINITY = tl.constexpr(storage.NOT_FINITE << 23)  # float32's bits


@triton.jit
def noise(step, entry):
    """32 random bits: the upper half is for the first moment, the lower for the second."""
    bits = entry.to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B1
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def load_moment(ptr, scale_ptr, entry, inside, SIGNED: tl.constexpr):
    """A block of moments in float32; one outside is a number that means nothing."""
    if ptr.dtype.element_ty == tl.uint8:
        code = tl.load(ptr + entry, mask=inside, other=0).to(tl.int32)
        shared = tl.load(scale_ptr + entry // SCALE_BLOCK, mask=inside, other=0).to(tl.int32)
        top: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
        magnitude = code & 0x7F if SIGNED else code
        field = magnitude >> MANTISSA
        mantissa = (magnitude & 15) + tl.where(field > 0, 16, 0)
        exponent = tl.maximum(field, 1) + shared - (top + MANTISSA)
        power = (tl.maximum(exponent, 0) << 23).to(tl.float32, bitcast=True)
        value = mantissa.to(tl.float32) * power
        if SIGNED:
            value = tl.where(code > 0x7F, -value, value)
        value = tl.where(shared == NOT_FINITE, float("nan"), value)
    else:
        value = tl.load(ptr + entry, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_moment(ptr, scale_ptr, entry, inside, value, up, SIGNED: tl.constexpr):
    """Store a block of moments, which begins at a multiple of ``SCALE_BLOCK`` entries.

    ``up``: the odds of rounding away from zero, int32 in units of 2^-16.
    """
    bits = value.to(tl.int32, bitcast=True)
    if ptr.dtype.element_ty == tl.uint8:
        _store_bytes(ptr, scale_ptr, entry, inside, bits, up, SIGNED)
    else:
        upper = (bits.to(tl.uint32, bitcast=True) + up.to(tl.uint32)) >> 16
        upper = tl.where(value == value, upper, 0x7FC0)
        tl.store(ptr + entry, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)


@triton.jit
def _store_bytes(ptr, scale_ptr, entry, inside, bits, up, SIGNED: tl.constexpr):
    top: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    magnitude = tl.where(inside, bits & 0x7FFFFFFF, 0)
    # The exponent of the largest value after rounding it up: no rounding leaves the range. NaN,
    # up to 0x7FFFFFFF (as GPUs make it), is taken for infinity, lest the sum overflow int32.
    blocks: tl.constexpr = magnitude.shape[0] // SCALE_BLOCK
    largest = tl.max(tl.reshape(magnitude, (blocks, SCALE_BLOCK)), axis=1, keep_dims=True)
    shared = (tl.minimum(largest, INFINITY) + ALMOST_ONE) >> 23
    shared = tl.reshape(tl.broadcast_to(shared, (blocks, SCALE_BLOCK)), magnitude.shape)
    exponent = magnitude >> 23
    relative = exponent - shared + top
    field = tl.maximum(relative, 1)  # below: subnormal, with the same unit as field 1
    shift = DROPPED + field - relative
    mantissa = ((magnitude & 0x7FFFFF) | 0x800000).to(tl.uint32)
    within = tl.minimum(shift, 31).to(tl.uint32)
    rounded = ((mantissa + (up.to(tl.uint32) << (within - 16))) >> within).to(tl.int32)
    code = ((field - 1) << MANTISSA) + rounded
    code = tl.where((shift > 31) | (exponent == 0), 0, code)
    if SIGNED:
        code += (bits >> 24) & 0x80
    else:
        code = tl.where((code == 0) & (exponent > 0), 1, code)
    code = tl.where(shared == NOT_FINITE, 0, code)
    tl.store(ptr + entry, code.to(tl.uint8), mask=inside)
    first = inside & (entry % SCALE_BLOCK == 0)
    tl.store(scale_ptr + entry // SCALE_BLOCK, shared.to(tl.uint8), mask=first)
