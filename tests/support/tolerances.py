"""The one place for tolerances: derived from the dtype and the number of summed terms."""

import math

import torch

# A rounding of the result, and of each input, in units that the dtype resolves.
UNIT = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def assert_matches(actual, truth, dtype=torch.float32, terms=1):
    """``actual`` equals the float64 ``truth`` up to the rounding of ``dtype``.

    The error is measured against the largest entry of the truth, since rounding errors of sums
    are on the scale of their terms, not of their result. ``terms``: how many numbers were summed.
    """
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    if truth.numel() == 0:
        return
    truth, actual = truth.double(), actual.double()
    assert torch.equal(truth.isnan(), actual.isnan()), "NaN in different places"
    bound = UNIT[dtype] * math.sqrt(max(terms, 1)) * truth.nan_to_num().abs().max().item()
    error = (actual - truth).nan_to_num().abs().max().item()
    assert error <= bound, f"error {error:.3e} > {bound:.3e}"
