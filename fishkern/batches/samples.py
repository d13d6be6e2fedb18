"""The samples of a batch: how many there are, and how to take some of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fishkern.batches.packing import packing_of


def can_slice(batch: Any) -> bool:
    """Whether ``take`` knows how to cut this batch."""
    containers = isinstance(batch, (Mapping, Tensor, tuple, list))
    return containers and not any(isinstance(leaf, PackedSequence) for leaf in _leaves(batch))


def holds_objects(batch: Any) -> bool:
    """Whether the batch holds anything of which it is not known if the samples are inside."""
    known = (Tensor, str, bytes, int, float, type(None))
    return not all(isinstance(leaf, known) for leaf in _leaves(batch))


def common_length(batch: Any) -> int | None:
    """Dimension 0 of the tensors in a tuple or list, if it is the same in all."""
    if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
        return None
    lengths = {len(value) for value in batch if isinstance(value, Tensor) and value.dim()}
    return lengths.pop() if len(lengths) == 1 else None


def token_counts(batch: Any, num_samples: int) -> dict[tuple[int, int], int]:
    """How many tokens a sample can have: for a tensor ``[N, T, K]`` T, and T * K.

    The key says which tensor, and the product of how many dimensions.
    """
    counts = {}
    for place, leaf in enumerate(_leaves(batch)):
        if isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == num_samples:
            product = 1
            for dims, length in enumerate(leaf.shape[1:], 1):
                product *= length
                counts[place, dims] = product
    return counts


def count(batch: Mapping[str, Any]) -> int:
    """The number of samples: as packed, or dimension 0 of the labels, or that of most tensors.

    Raises:
        ValueError: The batch holds no tensor.
    """
    if packing := packing_of(batch):
        return packing.num_samples
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim():
        return len(labels)
    if not tensors:
        raise ValueError(
            f"the batch has no tensor with samples in dimension 0 (keys: {', '.join(batch)}); "
            f"pass tensors, or a loss_fn that understands the batch"
        )
    return Counter(len(tensor) for tensor in tensors).most_common(1)[0][0]


def cut_batches(
    batches: Iterable[Any], num_samples: int | None, model: nn.Module, move: bool
) -> Iterator[tuple[Any, int | None]]:
    """Each batch with its size (None where only loss_fn can tell), ``num_samples`` in all.

    Batches without samples are left out.
    """
    device = next(model.parameters()).device
    left = num_samples
    for batch in batches:
        if not isinstance(batch, Mapping):
            if common_length(batch) != 0:
                yield batch, None  # its losses are counted; the boundary is checked there
            continue
        size = count(batch)
        if size == 0:
            continue
        if left is not None and size > left:
            batch, size = take(batch, 0, left, size), left
        if move:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        yield batch, size
        left = None if left is None else left - size


def check_num_samples(num_samples: Any) -> None:
    """Refuse what is no number of samples to stop after.

    Raises:
        TypeError: Neither an int nor None.
        ValueError: Less than 1.
    """
    if not isinstance(num_samples, int | None):
        raise TypeError(f"num_samples is {num_samples!r}: pass an int, or None for all")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: pass at least 1, or None for all")


def check_found(found: int, num_samples: int | None, total: int) -> None:
    """Refuse another number of samples than was asked for; of fewer, warn the caller's caller.

    ``total``: those of all ranks.

    Raises:
        ValueError: More than ``num_samples``, or none on any rank.
    """
    if total == 0:
        raise ValueError("batches held no samples: pass at least one batch")
    if num_samples is not None and found > num_samples:
        raise ValueError(
            f"num_samples is {num_samples}, inside a batch that ends at {found}: "
            f"only mappings of tensors can be cut; choose a batch boundary"
        )
    if num_samples is not None and found < num_samples:
        warnings.warn(
            f"num_samples is {num_samples}, but batches ended after {found}",
            UserWarning,
            stacklevel=3,
        )


def take(batch: Any, start: int, stop: int, num_samples: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch that holds ``num_samples``.

    Tensors and lists with ``num_samples`` entries are cut; everything else (a flag, position ids
    of shape [1, T]) belongs to all samples and is passed on. Packed batches: ``Packing.cut``.
    """
    return _cut(batch, slice(start, stop), num_samples)


def pick(batch: Any, chosen: Sequence[int], num_samples: int) -> Any:
    """The chosen samples, in that order, of a batch that holds ``num_samples``: see ``take``."""
    return _cut(batch, list(chosen), num_samples)


def _cut(batch: Any, chosen: slice | list[int], num_samples: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[chosen] if batch.dim() and len(batch) == num_samples else batch
    if packing := packing_of(batch):
        return packing.cut(batch, _entries(range(packing.num_samples), chosen))
    if isinstance(batch, Mapping):
        items = {key: _cut(value, chosen, num_samples) for key, value in batch.items()}
        return _rebuild(batch, items)
    if isinstance(batch, tuple):
        if batch and len(batch) == num_samples and all(isinstance(v, str) for v in batch):
            return tuple(_entries(batch, chosen))  # texts as DataLoader has them
        parts = [_cut(value, chosen, num_samples) for value in batch]
        named = hasattr(batch, "_fields")
        return type(batch)(*parts) if named else type(batch)(parts)
    if isinstance(batch, list):
        if len(batch) == num_samples and not any(isinstance(value, Tensor) for value in batch):
            return _entries(batch, chosen)
        return [_cut(value, chosen, num_samples) for value in batch]
    return batch


def _entries(values: Sequence[Any], chosen: slice | list[int]) -> list[Any]:
    return list(values[chosen]) if isinstance(chosen, slice) else [values[n] for n in chosen]


def _rebuild(batch: Any, items: dict[str, Any]) -> Any:
    """A mapping of the batch's own kind where it can be made from a dict (BatchEncoding can)."""
    if type(batch) is dict:
        return items
    try:
        return type(batch)(items)
    except TypeError:
        return items


def _leaves(batch: Any) -> Iterator[Any]:
    """What the containers hold in the end. Packed sequences stay whole."""
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        for value in batch:
            yield from _leaves(value)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    else:
        yield batch
