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


# An output of a small model in float32, or one of its weights after some steps, by two ways.
MODEL = 1e-5
# A squared gradient in float32, after a forward and a backward pass through a small model.
SCORE = 1e-5


def score_error(scores, truth):
    """The largest error of Fisher scores, with the name of the tensor that it is in.

    Relative to the tensor's largest true score. Some scores are zero in exact arithmetic
    (attention's key bias) and hold only rounding noise: 1e-3 of the model's root mean square
    takes the place of a scale that is smaller.
    """
    assert set(scores) == set(truth), set(scores) ^ set(truth)
    entries = sum(t.numel() for t in truth.values())
    typical = math.sqrt(sum(t.double().square().sum().item() for t in truth.values()) / entries)
    assert typical > 0, "the truth is zero everywhere: this would compare nothing"
    errors = []
    for name, true in truth.items():
        assert scores[name].shape == true.shape, name
        assert scores[name].isfinite().all(), name
        scale = max(true.abs().max().item(), 1e-3 * typical)
        errors.append(((scores[name].double().cpu() - true).abs().max().item() / scale, name))
    return max(errors)


def assert_scores_match(scores, truth, rounded=None):
    """Fisher scores equal the float64 ``truth`` up to float32's rounding.

    ``rounded``: the same scores by plain one-sample autograd in a narrower dtype. Then the error
    may be twice the one that this dtype makes there.
    """
    bound = SCORE if rounded is None else 2 * score_error(rounded, truth)[0] + SCORE
    error, name = score_error(scores, truth)
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e}"
