"""The self-check of scoring: a few samples again, by plain one-sample autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishkern.names import some
from fishkern.scoring.one_sample import OneSamplePasses

__all__ = ["FisherVerificationError", "check_losses", "require_finite", "verify_scores"]

_HALF = (torch.float16, torch.bfloat16)


class FisherVerificationError(RuntimeError):
    """The batched scores of some samples are not those of one-sample autograd."""


class _NarrowSeen(TorchFunctionMode):
    """Notes whether anything is computed in a half-width dtype.

    Autocast may be inside the forward (accelerate puts it there), or frozen weights be narrow.
    """

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or (isinstance(result, Tensor) and result.dtype in _HALF)
        return result


def check_losses(passes: OneSamplePasses, batch: Any, size: int, count: int) -> bool:
    """Compare losses of samples alone with those in the batch; was it in a half-width dtype?

    They differ where a tensor that belongs to all samples was cut because it is as long as the
    batch, where loss_fn divides by the number of samples, where samples depend on each other.

    Raises:
        FisherVerificationError: They do.
    """
    with _NarrowSeen() as narrow:
        whole = passes.batch_losses(batch, size).double()
    tolerance = 5e-2 if narrow.seen else 1e-3
    atol = tolerance * float(whole.abs().mean())
    for n, loss in enumerate(passes.losses_alone(batch, size, range(count))):
        alone, inside = float(loss), float(whole[n])
        if not (math.isfinite(alone) and math.isfinite(inside)):
            continue  # the scores will say so
        if not math.isclose(alone, inside, rel_tol=tolerance, abs_tol=atol):
            raise FisherVerificationError(
                f"sample {n} has the loss {alone:.6g} alone, but {inside:.6g} in its batch of "
                f"{size}. Do the samples depend on each other, or is loss_fn not a loss per "
                "sample? Or does a tensor as long as the batch belong to all samples? Then "
                "give it another leading dimension ([1, ...])"
            )
    seen: bool = narrow.seen
    return seen


def verify_scores(
    passes: OneSamplePasses,
    scores: Mapping[str, Tensor],
    batch: Any,
    size: int,
    count: int,
    names: list[str],
    narrow: bool,
) -> None:
    """``scores`` hold the fused scores of the first ``count`` samples: check them.

    The one-sample squares are subtracted in place, so that no second set of scores is needed. The
    rest must be rounding, on the scale of the tensor, or on that of the whole model: some scores
    are zero in exact arithmetic (attention's key bias) and hold only noise. ``narrow``: something
    was computed in a half-width dtype.

    Raises:
        FisherVerificationError: It is not.
        RuntimeError: A score is infinite or NaN.
    """
    require_finite({name: scores[name] for name in names})
    scale = {name: _norm(scores[name]) for name in names}

    def subtract(_: int, name: str, grad: Tensor) -> None:
        fused = scores[name]
        fused -= grad.to_dense().to(fused).square()

    passes.one_sample_passes(batch, size, range(count), names, subtract)
    rest = {name: _norm(scores[name]) for name in names}
    entries = {name: scores[name].numel() for name in names}
    # The root mean square over the model; half of it may be missing (a rule that gave zeros).
    squares = sum(max(scale[n], rest[n]) ** 2 for n in names)
    typical = (squares / max(sum(entries.values()), 1)) ** 0.5
    tolerance = _tolerance([passes.candidates[name] for name in names], narrow)
    wrong = {
        name: rest[name] / max(scale[name], 1e-30)
        for name in names
        if not rest[name] <= tolerance * (scale[name] + 1e-3 * typical * entries[name] ** 0.5)
    }
    if wrong:
        worst = sorted(wrong, key=lambda name: -wrong[name])[:3]
        raise FisherVerificationError(
            f"the batched scores of {len(wrong)} parameters differ from one-sample autograd: "
            + ", ".join(f"{name} by {wrong[name]:.1%}" for name in worst)
            + f" (tolerance {tolerance:.1%}). Do the samples depend on each other, or is loss_fn "
            "not a loss per sample? If a module mixes its samples on purpose, leave its "
            "parameters out with params="
        )


def require_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where a score overflowed."""
    # Nothing is negative, and a NaN is passed on: the largest tells, in a tenth of the time.
    if bad := [n for n, s in scores.items() if s.numel() and not bool(s.amax().isfinite())]:
        raise RuntimeError(
            f"the scores of {some(bad)} overflowed or are NaN: score in float32 or bfloat16, or "
            f"look for infinities in the loss"
        )


def _norm(scores: Tensor) -> float:
    return float(torch.linalg.vector_norm(scores, dtype=torch.float64))


def _tolerance(params: list[nn.Parameter], narrow: bool) -> float:
    """Rounding of a squared gradient, generously: a wrong score is off by its own size."""
    if narrow or any(param.dtype in _HALF for param in params):
        return 0.2
    device = params[0].device.type if params else "cpu"
    tf32 = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return 1e-2 if tf32 else 1e-3
