"""What differs, bit for bit, between a model and the base that it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.names import by_canonical_name, named_parameters
from fishkern.tensors import is_sharded
from fishkern.training.leaves import CHILD
from fishkern.training.train_only import attached

__all__ = ["Base", "bits", "differing", "digest", "form", "matched", "tensors_of"]

Base = nn.Module | Mapping[str, Any]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes an element; else int64
_CHUNK = 1 << 20  # elements summed at a time, since summing makes int64 of them


def matched(model: nn.Module, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Each of the model's parameters and persistent buffers: as it is in the base, and as it is.

    By canonical name; a tied weight once. Each tensor is where it was.

    Raises:
        ValueError: As in ``save_delta``.
        TypeError: The model is none, or the base is neither a model nor a mapping.
    """
    own = tensors_of(model)
    if isinstance(base, nn.Module):
        found: Mapping[str, Tensor] = tensors_of(base)
    elif not isinstance(base, Mapping):
        raise TypeError(
            f"base is a {type(base).__name__}: pass the model as it was before training, or a copy "
            f"of its state_dict()"
        )
    else:
        tensors = [(name, value) for name, value in base.items() if isinstance(value, Tensor)]
        found = by_canonical_name(tensors, "base")
    names = _all_names(model)
    pairs = {}
    for name, tensor in own.items():
        key = next((other for other in names.get(name, [name]) if other in found), None)
        if key is None:
            raise ValueError(f"the base has no {name!r}: pass the base that the model came from")
        before = found[key].detach()
        if form(before) != form(tensor):
            raise ValueError(
                f"{name!r} is {form(before)} in the base and {form(tensor)} in the model: load the "
                f"base as the model was loaded"
            )
        if tensor.numel() and before.data_ptr() == tensor.data_ptr():
            raise ValueError(
                f"{name!r} of the base is the model's own tensor, which training changed too: pass "
                f"the base loaded again, or copy.deepcopy(model.state_dict()) from before training"
            )
        pairs[name] = (before, tensor)
    return pairs


def differing(before: Tensor, after: Tensor) -> Tensor:
    """The flat positions, int64 and ascending, at which two tensors differ in their bits."""
    return (bits(before.to(after.device)) != bits(after)).nonzero().flatten()


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as 1-D integers: a view where it is contiguous, else a copy."""
    return tensor.reshape(-1).view(_BITS.get(tensor.element_size(), torch.int64))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, by canonical name, and its persistent buffers, all detached.

    Of a model that ``train_only`` is attached to: the weights, with the leaves' values in them.

    Raises:
        ValueError: A tensor is sharded, or has no values yet.
        TypeError: The model is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} in the place of a model: pass the nn.Module")
    if (handle := attached(model)) is not None:
        handle.sync()
    found = {n: p.detach() for n, p in named_parameters(model).items() if CHILD not in n.split(".")}
    found |= by_canonical_name(_persistent_buffers(model), "the buffers")
    for name, tensor in found.items():
        if is_sharded(tensor):
            raise ValueError(
                f"{name!r} is sharded (DTensor): pass the model gathered, or unsharded"
            )
        if tensor.is_meta:
            raise ValueError(f'{name!r} is on "meta" and has no values: load the weights first')
    return found


def form(tensor: Tensor) -> str:
    """Its shape and dtype, to compare and to read."""
    return f"{list(tensor.shape)} in {tensor.dtype}"


def digest(tensor: Tensor, where: Tensor | slice) -> str:
    """A SHA-256 over shape, dtype, the sum of all bits, and the bits at ``where``.

    Summing goes at the speed of memory, on any device; only ``where`` is brought to the host.
    """
    flat = bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        total += chunk.sum(dtype=torch.int64)  # wraps around, so that the order does not matter
    if isinstance(where, Tensor):
        where = where.to(flat.device)
    digest = hashlib.sha256(f"{form(tensor)} {int(total)}".encode())
    digest.update(flat[where].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer.detach()


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first: a tied weight has several."""
    groups: dict[int, list[str]] = {}
    every = by_canonical_name(model.named_parameters(remove_duplicate=False), "the parameters")
    for name, param in every.items():
        groups.setdefault(id(param), []).append(name)
    return {names[0]: names for names in groups.values()}
