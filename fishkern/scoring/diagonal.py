"""FisherDiagonal: one float32 score per parameter entry, and how it was come by."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fishkern import files
from fishkern.names import by_canonical_name, canonical_name
from fishkern.selection.ranking import check_scores

__all__ = ["ROUTES", "FisherDiagonal"]

ROUTES = ("fused", "vmap", "loop")
_SAMPLE_SCORES = "(sample scores)"  # in files: no parameter has such a name


class FisherDiagonal(Mapping[str, Tensor]):
    """The diagonal of the Fisher information, as a mapping from parameters' names to scores.

    ``estimate_fisher`` makes it; made by hand it holds any scores that ``select`` is to rank.

    Args:
        scores: For each parameter a float32 tensor of its shape, the mean over the samples. Held,
            not copied. Wrappers' prefixes are dropped from the names, here and when asked for one.
        num_samples: How many samples the mean is over; 0 for another kind that needs none.
        labels: Where the labels came from: "empirical", "sampled", "expected"; None: not said.
        routes: For each parameter how it was scored: "fused", "vmap" or "loop"; may leave some out.
        reasons: For parameters that were not "fused" why, a sentence each; may leave some out.
        sample_scores: float32 ``[num_samples]``: each sample's squares, summed over entries.
        kind: What the scores are: "fisher", or a kind of ``baseline_scores``.

    Raises:
        TypeError: A score that is not a float32 tensor, or a field of another type.
        ValueError: Two names that are one, a route or reason for no parameter, no samples, or
            sample scores of another shape.

    Example:
        >>> import torch
        >>> scores = FisherDiagonal({"module.weight": torch.ones(2, 3)}, num_samples=8)
        >>> list(scores), scores["module.weight"].shape
        (['weight'], torch.Size([2, 3]))
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        num_samples: int,
        labels: str | None = None,
        routes: Mapping[str, str] | None = None,
        reasons: Mapping[str, str] | None = None,
        sample_scores: Tensor | None = None,
        kind: str = "fisher",
    ) -> None:
        if not isinstance(scores, Mapping):
            raise TypeError(f"scores is a {type(scores).__name__}: pass a mapping name -> tensor")
        self._scores = by_canonical_name(scores.items(), "scores")
        check_scores(self._scores)
        self._scores = {name: score.detach() for name, score in self._scores.items()}
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            raise TypeError(f"num_samples is {num_samples!r}: pass an int")
        if not isinstance(kind, str):
            raise TypeError(f"kind is {kind!r}: pass a string")
        if num_samples < (kind == "fisher"):
            raise ValueError(f"num_samples is {num_samples}: a mean is over one sample or more")
        if labels is not None and not isinstance(labels, str):
            raise TypeError(f"labels is {labels!r}: pass a string or None")
        self.num_samples = num_samples
        self.labels = labels
        self.kind = kind
        self.routes: dict[str, str] = by_canonical_name((routes or {}).items(), "routes")
        for name, route in self.routes.items():
            if name not in self._scores:
                raise ValueError(f"routes names {name!r}, which has no score")
            if route not in ROUTES:
                raise ValueError(f"the route of {name!r} is {route!r}: one of {', '.join(ROUTES)}")
        self.reasons: dict[str, str] = by_canonical_name((reasons or {}).items(), "reasons")
        for name, reason in self.reasons.items():
            if name not in self._scores:
                raise ValueError(f"reasons names {name!r}, which has no score")
            if not isinstance(reason, str):
                raise TypeError(f"the reason of {name!r} is {reason!r}: pass a string")
        self.sample_scores = sample_scores
        if sample_scores is not None:
            check_scores({"sample_scores": sample_scores})
            if sample_scores.shape != (num_samples,):
                raise ValueError(
                    f"sample_scores has shape {list(sample_scores.shape)}, num_samples is "
                    f"{num_samples}: pass one for each sample"
                )
            self.sample_scores = sample_scores.detach()

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[canonical_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __eq__(self, other: object) -> bool:
        """Bit for bit the same scores of the same kind, samples and labels."""
        if not isinstance(other, FisherDiagonal):
            return NotImplemented
        return (
            self._scores.keys() == other._scores.keys()
            and (self.kind, self.num_samples) == (other.kind, other.num_samples)
            and self.labels == other.labels
            and all(_equal(score, other[name]) for name, score in self.items())
            and _equal(self.sample_scores, other.sample_scores)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        size = sum(score.numel() for score in self.values())
        parts = [f"{len(self)} tensors, {size:,} scores, {self.num_samples} samples"]
        if self.kind != "fisher":
            parts.append(f"kind={self.kind!r}")
        if self.labels is not None:
            parts.append(f"labels={self.labels!r}")
        if self.routes:
            counts = Counter(self.routes.values())
            routes = " ".join(f"{counts[route]} {route}" for route in ROUTES if counts[route])
            parts.append(routes + (" (see .reasons)" if self.reasons else ""))
        return f"FisherDiagonal({', '.join(parts)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to a safetensors file, whole or not at all."""
        fields = {
            "shapes": {name: list(score.shape) for name, score in self.items()},
            "num_samples": self.num_samples,
            "labels": self.labels,
            "kind": self.kind,
            "routes": self.routes,
            "reasons": self.reasons,
        }
        tensors = dict(self._scores)
        if self.sample_scores is not None:
            tensors[_SAMPLE_SCORES] = self.sample_scores
        files.save(path, "fisher", tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FisherDiagonal:
        """Read what ``save`` wrote, onto the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file was cut or edited, or holds something else.
        """
        scores, fields = files.load(path, "fisher")
        sample_scores = scores.pop(_SAMPLE_SCORES, None)
        kwargs: dict[str, Any] = {key: fields[key] for key in ("num_samples", "labels", "routes")}
        kwargs |= {"kind": fields.get("kind", "fisher"), "reasons": fields.get("reasons")}
        return cls(scores, sample_scores=sample_scores, **kwargs)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())
