"""Moments in bfloat16 and in 8 bits: what the bits mean, and what rounding costs."""

import pytest
import torch

from fishkern.functional import dequantize_moment, masked_adamw_quantized_, quantize_moment

NARROW = [torch.bfloat16, torch.uint8]
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])


def spread(count, signed):
    """Values over many orders of magnitude, some of them zero."""
    value = torch.randn(count) * (4 * torch.randn(count)).exp() * 1e-6
    value[torch.rand(count) < 0.05] = 0
    return value if signed else value.square()


def binade(value):
    """The power of two below each value; far below everything for zero."""
    return 2 ** value.double().abs().clamp(min=1e-300).log2().floor()


def resolution(value, dtype, signed):
    """The distance of each value's neighbours among what can be stored, in float64."""
    if dtype == torch.bfloat16:
        return binade(value) / 2**7
    blocks = torch.nn.functional.pad(value.double().abs(), (0, -len(value) % 32)).view(-1, 32)
    largest = binade(blocks.amax(1)) * 2  # it may have been rounded up
    least = largest.repeat_interleave(32)[: len(value)] * 2.0 ** -(6 if signed else 14)
    return torch.maximum(binade(value), least) / 2**4


@SIGNED
@pytest.mark.parametrize("scale", [127, 100, 150])
def test_every_byte_is_the_number_that_the_format_says(scale, signed):
    """(-1)^s 2^(e - top) (1 + f / 16), or f / 16 in the lowest binade, times 2^(scale - 127)."""
    expected = []
    for byte in range(256):
        sign = -1.0 if signed and byte >= 128 else 1.0
        exponent, fraction = (byte % 128 if signed else byte) // 16, byte % 16 / 16
        top = 7 if signed else 15
        significand = 1 + fraction if exponent else fraction
        expected.append(sign * significand * 2.0 ** (max(exponent, 1) - top + scale - 127))
    codes, scales = torch.arange(256).to(torch.uint8), torch.full((8,), scale, dtype=torch.uint8)
    found = dequantize_moment(codes, scales, signed=signed)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), torch.tensor(expected, dtype=torch.float64))
    # And each number, beside one that sets the scale, is stored as that byte again.
    whole = found.view(8, 32).clone()
    whole[:, 31] = 2.0 ** (scale - 127)
    again, of_blocks = quantize_moment(whole.view(-1), torch.uint8, signed=signed)
    assert (of_blocks == scale).all()
    kept = torch.arange(256) % 32 != 31
    kept[128] &= not signed  # -0.0 has its sign, and an unsigned 0 is no number but 0
    assert torch.equal(again[kept], codes[kept])


@SIGNED
@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_to_nearest_errs_by_half_the_distance(dtype, signed):
    value = spread(1000, signed)
    stored, scale = quantize_moment(value, dtype, signed=signed)
    found = dequantize_moment(stored, scale, signed=signed)
    distance = resolution(value, dtype, signed)
    error = (found.double() - value.double()).abs()
    lifted = (value > 0) & (value.double() < distance / 2) if not signed else value.isnan()
    assert (error <= torch.where(lifted, 1.0, 0.5) * distance).all()
    assert (found[value == 0] == 0).all()
    again = dequantize_moment(*quantize_moment(found, dtype, signed=signed), signed=signed)
    assert torch.equal(again, found), "what is stored is kept"


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_bytes_for_each_entry(count):
    """With an int32 index, 6.06 bytes: 6.2 at most wherever there are a few entries."""
    total = 4 * count
    for signed in (True, False):
        stored, scale = quantize_moment(torch.ones(count), torch.uint8, signed=signed)
        total += stored.nbytes + scale.nbytes
    assert total == 6 * count + 2 * -(-count // 32)


def test_second_moments_are_never_stored_as_zero():
    """The update divides by their root."""
    value = torch.tensor([1.0, *[1e-12] * 30, 0.0])
    found = dequantize_moment(*quantize_moment(value, torch.uint8, signed=False), signed=False)
    assert (found[:31] > 0).all()
    assert found[31] == 0


@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
def test_a_block_that_is_not_finite_is_nan(odd):
    value = torch.ones(70)
    value[40] = odd
    found = dequantize_moment(*quantize_moment(value, torch.uint8, signed=True), signed=True)
    assert found[32:64].isnan().all()
    assert (found[:32] == 1).all()
    assert (found[64:] == 1).all()
    found = dequantize_moment(*quantize_moment(value, torch.bfloat16, signed=True), signed=True)
    assert torch.equal(found[value.isfinite()], value[value.isfinite()])
    assert str(found[40].item()) == str(odd), "bfloat16 has an infinity of its own"


def stored_gradient(gradient, dtype, step):
    """Both moments after a step with betas of zero: the gradient and its square, rounded."""
    count = len(gradient)
    m, v = (torch.zeros(count, dtype=dtype) for _ in range(2))
    scales = [[], []]
    if dtype == torch.uint8:
        scales = [[torch.zeros(-(-count // 32), dtype=dtype)] for _ in range(2)]
    whole = torch.empty(0, dtype=torch.int64)
    masked_adamw_quantized_(
        [torch.zeros(count)], [gradient], [whole], [m], [v],
        steps=[step], lr=0.1, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0,
        exp_avg_scales=scales[0], exp_avg_sq_scales=scales[1],
    )  # fmt: skip
    return [
        dequantize_moment(stored, *scale, signed=signed)
        for stored, scale, signed in ((m, scales[0], True), (v, scales[1], False))
    ]


@pytest.mark.parametrize("value", [0.3, -0.77, 0.011, 0.004])
@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_at_random_has_the_right_mean(backend, dtype, value):
    """Up or down to a neighbour, and the mean over entries and steps is the value."""
    gradient = torch.full((4096,), value)
    gradient[::32] = 1.0  # sets each block's scale
    chosen = torch.arange(4096) % 32 != 0
    steps = range(1, 5)
    seen = [stored_gradient(gradient, dtype, step) for step in steps]
    for kind, (truth, signed) in enumerate([(gradient, True), (gradient.square(), False)]):
        found = torch.stack([moments[kind] for moments in seen])[:, chosen].double()
        exact, (low, high) = truth[1].double(), found.abs().unique()
        distance = high - low
        assert low < exact.abs() < high
        assert distance <= (1 + 1e-6) * resolution(truth, dtype, signed)[1]
        up = (exact.abs() - low) / distance  # the odds
        deviation = (up * (1 - up) / found.numel()) ** 0.5 * distance
        # and 16 random bits, of which each entry's mean may be one too low
        assert abs(found.mean() - exact) < 5 * deviation + distance * 2**-16
        for step in range(len(steps) - 1):  # steps are independent of each other
            same = (found[step] == found[step + 1]).double().mean()
            expected = up**2 + (1 - up) ** 2
            assert abs(same - expected) < 5 * (0.25 / chosen.sum()) ** 0.5


@pytest.mark.parametrize("dtype", NARROW)
def test_the_same_step_rounds_alike_and_the_next_one_does_not(backend, dtype):
    gradient = torch.randn(500)
    first, again, other = (stored_gradient(gradient, dtype, step) for step in (7, 7, 8))
    assert all(map(torch.equal, first, again))
    for one, two in zip(first, other, strict=True):
        assert 0.05 < (one != two).double().mean() < 0.7


def test_refusals():
    with pytest.raises(TypeError, match=r"dtype is torch.float16: pass torch.bfloat16 or"):
        quantize_moment(torch.ones(4), torch.float16, signed=True)
    stored, scale = quantize_moment(torch.ones(40), torch.uint8, signed=True)
    with pytest.raises(TypeError, match=r"stored is torch.float32: pass torch.bfloat16 or"):
        dequantize_moment(stored.float(), signed=True)
    with pytest.raises(ValueError, match="scale has 0 entries, but needs 1"):
        dequantize_moment(stored, signed=True)
    with pytest.raises(ValueError, match="scale has 1 entries, but needs 0"):
        dequantize_moment(stored.bfloat16(), scale, signed=True)
    with pytest.raises(ValueError, match=r"scale\[0\] has 1 entries, but 40 moments have 2 scales"):
        dequantize_moment(stored, scale[:1], signed=True)
