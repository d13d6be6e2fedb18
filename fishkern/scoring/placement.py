"""Whether what is counted for a sample comes from that sample alone.

Shapes do not tell. A model may sort its samples, put a second view of all behind the first
(``[a_1 .. a_N, b_1 .. b_N]``), or gather from all samples a list that has N entries by chance. But
if each sample's loss is weighted by a number w_n of its own, its squared gradients are ``w_n^2``
times as large, and those of no other sample are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fishkern.scoring.sample_scores import SampleScores

__all__ = ["SumsByLayer", "misplaced", "sample_weights"]

Names = tuple[str, ...]


class SumsByLayer(SampleScores):
    """Each sample's squared gradients, summed over the parameters that are squared together."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[Names, dict[torch.device, Tensor]] = {}

    def begin(self, num_samples: int) -> None:
        """See ``SampleScores``."""
        super().begin(num_samples)
        self._layers = {}

    def add_layer(self, *args: Any) -> None:
        """See ``SampleScores``."""
        with self._layer(tuple(args[3].values())):
            super().add_layer(*args)

    def add_squares(self, name: str, *args: Any) -> None:
        """See ``SampleScores``."""
        with self._layer((name,)):
            super().add_squares(name, *args)

    def add_rows(self, name: str, *args: Any) -> None:
        """See ``SampleScores``."""
        with self._layer((name,)):
            super().add_rows(name, *args)

    def take(self) -> dict[Names, Tensor]:
        """float32 ``[N]`` of each layer; from here on they start again."""
        sums = {}
        for names in self._layers:
            with self._layer(names):
                sums[names] = self._sum()
        self._layers = {}
        return sums

    @contextmanager
    def _layer(self, names: Names) -> Iterator[None]:
        before, self._batch = self._batch, self._layers.setdefault(names, {})
        try:
            yield
        finally:
            self._batch = before


def sample_weights(losses: Tensor) -> Tensor:
    """From 1 to 2, far apart for samples that are neighbours, like ``losses`` ``[N]``."""
    steps = torch.arange(len(losses), device=losses.device, dtype=torch.float64)
    return (1 + (steps * 0.6180339887) % 1).to(losses.dtype)


def misplaced(
    plain: Mapping[Names, Tensor],
    weighted: Mapping[Names, Tensor],
    weights: Tensor,
    entries: Mapping[str, int],
    tolerance: float,
) -> set[str]:
    """Of which parameters some sample's squares do not follow its loss's weight.

    Args:
        plain: Each layer's squares by sample ``[N]``.
        weighted: The same with all losses weighted.
        weights: ``[N]``.
        entries: How many each parameter has. Squares that are zero in exact arithmetic hold only
            noise: a thousandth of what so many entries have in the whole model counts for none.
        tolerance: Relative.
    """
    total = sum(float(sums.sum(dtype=torch.float64)) for sums in plain.values())
    count = sum(entries[name] for names in plain for name in names) * len(weights)
    typical = total / max(count, 1)
    wrong: set[str] = set()
    for names, sums in plain.items():
        expected = sums.double() * weights.to(sums.device).double().square()
        found = weighted[names].double() if names in weighted else torch.zeros_like(expected)
        noise = 1e-3 * typical * sum(entries[name] for name in names)
        if bool(((found - expected).abs() > tolerance * (expected + noise)).any()):
            wrong.update(names)
    return wrong
