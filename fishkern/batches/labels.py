"""Labels from the model's own distribution: drawn from it, or all of them, each by its weight.

The Fisher information is an expectation over ``y ~ p(y | x_n)``, for which the empirical Fisher
puts the data's own label. Here are the other two ways: one draw, and the exact sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LABELS", "Draws", "check_labels", "expected_terms"]

LABELS = ("empirical", "sampled", "expected")
_SEEDS = 2**62


def check_labels(labels: str, loss_fn: object, generator: Any) -> None:
    """Refuse labels that there are not, and other arguments of ``estimate_fisher`` beside them."""
    if labels not in LABELS:
        raise ValueError(f"labels is {labels!r}: choose one of {', '.join(LABELS)}")
    if loss_fn is not None and labels != "empirical":
        raise ValueError(
            f"labels is {labels!r}, but loss_fn chooses its own labels: draw them there (the same "
            f'ones whenever it sees a sample again), and leave labels="empirical"'
        )
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator is {generator!r}: pass a torch.Generator, or None")


class Draws:
    """Where drawn labels come from: one seed for all devices, another one on each rank.

    Args:
        generator: The seed is drawn from it; None: from torch's global one.
        rank: Added to the seed, so that ranks whose generators are alike draw differently.
    """

    def __init__(self, generator: torch.Generator | None = None, rank: int = 0) -> None:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(_SEEDS, (), generator=generator, device=device)
        self._seed = int(seed) + rank
        self._generators: dict[torch.device, torch.Generator] = {}

    def classes(self, logits: Tensor) -> Tensor:
        """One class ``[M]`` for each row of logits ``[M, C]``, by ``softmax(logits)``.

        ``argmax_c (logit_c - log e_c)`` with independent exponential ``e_c`` is so distributed.
        NaN stays to be seen in the loss; a class of logit -inf is never drawn.
        """
        noise = torch.empty_like(logits).exponential_(generator=self._on(logits.device))
        return torch.sub(logits, noise.log_()).argmax(-1)

    def values(self, means: Tensor) -> Tensor:
        """``y ~ N(mean, 1)``, of the shape of the means."""
        noise = torch.empty_like(means).normal_(generator=self._on(means.device))
        return means + noise

    def _on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def expected_terms(logits: Tensor) -> Tensor:
    """Terms whose squared gradients sum up to the expectation over all labels of a sample.

    Gaussian with unit variance, logits ``[N]`` (the means f): ``E (grad 0.5 (y - f)^2)^2 =
    (grad f)^2``, so that f itself is the one term.

    Classes, logits ``[N, C]``: ``sum_c p_c (grad log p_c)^2`` would take C terms,
    ``sqrt(p_c) log p_c`` with the root held constant. C - 1 do: the class is found by C - 1
    decisions, "class j, or one after it?", and the information of decisions in a row adds up.
    With ``r_j = sum_{i >= j} p_i`` the decision j is met with probability r_j, its log-odds are
    ``f_j - log sum_{i > j} exp f_i``, and the variance of its outcome is ``p_j r_{j+1} / r_j^2``:

        term_j = sqrt(p_j r_{j+1} / r_j) (f_j - sum_{i > j} (p_i / r_{j+1}) f_i)

    with everything but f held constant. (The columns of a Cholesky factor of diag(p) - p p^T.)
    Two classes thus cost what one label costs.

    Returns:
        ``[K, N]``: K = 1, or C - 1.
    """
    if logits.dim() == 1:
        return logits[None]
    p = logits.detach().softmax(1)
    rest = _tail_sums(p)[:, 1:]
    weight = (p[:, :-1] * rest / (p[:, :-1] + rest).clamp(min=_tiny(p))).sqrt()
    # A class of probability zero has no part in it, also where its logit is -inf.
    weighted = (p * logits).masked_fill(p == 0, 0.0)
    mean = _tail_sums(weighted)[:, 1:] / rest.clamp(min=_tiny(p))
    terms = weight * (logits[:, :-1] - mean)
    return terms.masked_fill(weight == 0, 0.0).T


def _tail_sums(values: Tensor) -> Tensor:
    """Of each entry and those after it, along dimension 1."""
    return values.flip(1).cumsum(1).flip(1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
