"""The samples of a batch: how many there are, and how to take some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def can_slice(batch: Any) -> bool:
    """Whether ``take`` knows how to cut this batch."""
    return isinstance(batch, (Mapping, Tensor, tuple, list))


def count(batch: Mapping[str, Any]) -> int:
    """The number of samples: dimension 0 of the labels, else of the first tensor.

    Raises:
        ValueError: The batch holds no tensor.
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim():
        return len(labels)
    if not tensors:
        raise ValueError(
            f"the batch has no tensor with samples in dimension 0 (keys: {', '.join(batch)}); "
            f"pass tensors, or a loss_fn that understands the batch"
        )
    return len(tensors[0])


def take(batch: Any, start: int, stop: int, num_samples: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch that holds ``num_samples``.

    Tensors and lists with ``num_samples`` entries are cut; everything else (a flag, position ids
    of shape [1, T]) belongs to all samples and is passed on.
    """
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.dim() and len(batch) == num_samples else batch
    if isinstance(batch, Mapping):
        items = {key: take(value, start, stop, num_samples) for key, value in batch.items()}
        return _rebuild(batch, items)
    if isinstance(batch, tuple):
        if batch and len(batch) == num_samples and all(isinstance(v, str) for v in batch):
            return batch[start:stop]  # texts as DataLoader has them
        parts = [take(value, start, stop, num_samples) for value in batch]
        named = hasattr(batch, "_fields")
        return type(batch)(*parts) if named else type(batch)(parts)
    if isinstance(batch, list):
        if len(batch) == num_samples and not any(isinstance(value, Tensor) for value in batch):
            return batch[start:stop]
        return [take(value, start, stop, num_samples) for value in batch]
    return batch


def _rebuild(batch: Any, items: dict[str, Any]) -> Any:
    """A mapping of the batch's own kind where it can be made from a dict (BatchEncoding can)."""
    if type(batch) is dict:
        return items
    try:
        return type(batch)(items)
    except TypeError:
        return items
