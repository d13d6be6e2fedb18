"""Deltas: what training changed in a model, as a small file that goes on the base and off again.

What is stored is a difference of bits, ``before XOR after``. A difference of values would not do:
``a + (b - a)`` is not always b in floating point. XOR leads from the base's bits to the trained
ones and back, exactly, in every dtype, and takes as many bytes as one of the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishkern import files
from fishkern.differences import Base, bits, differing, digest, form, matched, tensors_of
from fishkern.names import match, named_parameters, some
from fishkern.selection.masks import SparseMask
from fishkern.training.train_only import attached

__all__ = ["apply_delta", "revert_delta", "save_delta"]

#: From this share of changed entries on a tensor is stored whole.
WHOLE = 0.9

#: What a file says of each tensor: shape, dtype, and its digest before and after.
Listed = dict[str, dict[str, Any]]


@torch.no_grad()
def save_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: Base,
    mask: SparseMask | None = None,
    whole: str | Iterable[str] = (),
) -> None:
    """Write everything in which the model differs from its base to one small file.

    Nothing that training changed is left out: weights, and persistent buffers (a BatchNorm's
    statistics). On disk a changed entry takes the bytes of its value and two for its place (four
    where changes lie far apart): 6 in float32, 4 in bfloat16. A tensor of which nine tenths
    changed, like a head that was trained whole, is stored *whole*, before and after:
    ``apply_delta`` puts it in the place of whatever the model has there, so that a head that each
    loading initialises anew travels too.

    The file also holds the base's fingerprint: of every parameter its name, shape and dtype, the
    sum of its bits, and a SHA-256 of the bits of its changed entries. Of tensors stored whole it
    covers no values.

    Args:
        model: The trained model, plain, wrapped, or with ``train_only`` attached.
        path: The file; one that is there is replaced.
        base: What training started from: the model loaded again (``from_pretrained``), or copies of
            its tensors, made before training by ``copy.deepcopy(model.state_dict())``.
        mask: Where given, what may have changed: a change anywhere else, but for ``whole``, is
            refused, which finds a wrong base.
        whole: Glob patterns of tensors to store whole, whatever changed in them.

    Raises:
        ValueError: The base has other names, shapes or dtypes, or shares its memory with the model;
            nothing changed, or something outside the mask did; a tensor is sharded or on "meta"; a
            pattern matches nothing.
        TypeError: The model is no ``nn.Module``, or the base neither one nor a mapping.

    Example:
        >>> import copy, tempfile, torch, fishkern
        >>> model = torch.nn.Linear(3, 2)
        >>> base = copy.deepcopy(model.state_dict())
        >>> with torch.no_grad():  # the training
        ...     model.weight[1, 2] += 0.1
        >>> path = tempfile.mkdtemp() + "/delta.safetensors"
        >>> fishkern.save_delta(model, path, base=base)
        >>> other = torch.nn.Linear(3, 2)
        >>> _ = other.load_state_dict(base)
        >>> fishkern.apply_delta(other, path)
        >>> torch.equal(other.weight, model.weight)
        True
        >>> fishkern.revert_delta(other, path)
        >>> torch.equal(other.weight, base["weight"])
        True
    """
    if mask is not None:
        mask.bind(model)  # refuses a mask of another model
    pairs = matched(model, base)
    forced = set(match(list(pairs), whole, "whole"))
    params = named_parameters(model)
    stored: dict[str, Tensor] = {}
    listed: dict[str, dict[str, Any]] = {}
    outside = []
    for name, (before, after) in pairs.items():
        before = before.to(after.device)
        index = differing(before, after)
        if name not in forced and mask is not None and not _inside(mask, name, index):
            outside.append(name)
        if not len(index) and name not in params and name not in forced:
            continue  # a buffer that training left alone
        entry: dict[str, Any] = {"shape": list(after.shape), "dtype": str(after.dtype)}
        if name in forced or 0 < WHOLE * after.numel() <= len(index):
            stored["before." + name], stored["after." + name] = before, after
            entry |= {"before": None, "after": digest(after, slice(None))}
        else:
            if len(index):
                stored["gaps." + name] = _gaps(index)
                stored["xor." + name] = bits(before)[index] ^ bits(after)[index]
            entry |= {"before": digest(before, index), "after": digest(after, index)}
        listed[name] = entry
    if outside:
        raise ValueError(
            f"outside the mask the model differs from the base in {some(outside)}: pass the base "
            f"that training started from, and name in whole= what was trained beside the mask"
        )
    if not stored:
        raise ValueError(
            "the model equals the base bit for bit, so that there is nothing to save: pass the "
            "base as it was before training, and save after training"
        )
    files.save(path, "delta", stored, {"tensors": listed})


def apply_delta(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Turn the base, in place, into the trained model that ``save_delta`` saw, bit for bit.

    Args:
        model: The base: the names, shapes, dtypes and values of its parameters are checked against
            the fingerprint in the file (see ``save_delta``). On any device; wrapped or plain.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file was cut or edited, or the model is not its base; the message names the
            tensors. The model is as it was.

    Example:
        See ``save_delta``.

        >>> import fishkern, torch
        >>> fishkern.apply_delta(torch.nn.Linear(3, 2), "nowhere.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there is no file nowhere.safetensors
    """
    _exchange(model, path, "before", "after")


def revert_delta(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Turn a model that a delta was applied to, or saved from, back into its base, bit for bit.

    Tensors stored whole get the values that they had in the base given to ``save_delta``.

    Args:
        model: The model as ``apply_delta`` left it; what has changed since is refused.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file was cut or edited, or the model is not as the delta leaves it; the
            message names the tensors. The model is as it was.

    Example:
        See ``save_delta``.

        >>> import fishkern, torch
        >>> fishkern.revert_delta(torch.nn.Linear(3, 2), "nowhere.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there is no file nowhere.safetensors
    """
    _exchange(model, path, "after", "before")


@torch.no_grad()
def _exchange(model: nn.Module, path: str | os.PathLike[str], now: str, then: str) -> None:
    """Bring the model from one side of the delta, "before" or "after", to the other."""
    stored, fields = files.load(path, "delta")
    listed: Listed = fields["tensors"]
    tensors = tensors_of(model)
    places = {name: _place(stored, name) for name in listed}
    _check_names(model, path, tensors, listed)
    _check_values(path, tensors, listed, places, now, then)
    for name, where in places.items():
        tensor = tensors[name]
        if isinstance(where, slice):
            tensor.copy_(stored[f"{then}.{name}"])
        elif len(where):
            flat = bits(tensor)
            flat[where.to(flat.device)] ^= stored["xor." + name].to(flat.device)
            if not tensor.is_contiguous():  # then flat is a copy
                tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))
    if (handle := attached(model)) is not None:
        handle.sync()  # the leaves follow


def _check_names(
    model: nn.Module,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    listed: Listed,
) -> None:
    """Refuse a model of other tensors than the delta's base."""
    params = named_parameters(model).keys() & tensors.keys()
    if strange := sorted(params - listed.keys()):
        raise ValueError(
            f"the model has {some(strange)}, which the base of {path} does not have: load the "
            f"model that the delta was saved for"
        )
    if missing := sorted(listed.keys() - tensors.keys()):
        raise ValueError(
            f"the model does not have {some(missing)}, which the base of {path} has: load the "
            f"model that the delta was saved for"
        )
    for name, entry in listed.items():
        if (expected := f"{entry['shape']} in {entry['dtype']}") != form(tensors[name]):
            raise ValueError(
                f"{name!r} is {form(tensors[name])} in the model and {expected} in {path}: load "
                f"the base in the dtype and size that it was trained in"
            )


def _check_values(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    listed: Listed,
    places: Mapping[str, Tensor | slice],
    now: str,
    then: str,
) -> None:
    """Refuse a model that is not on the side ``now`` of the delta."""
    found = {
        name: digest(tensors[name], places[name])
        for name, entry in listed.items()
        if entry[now] is not None
    }
    wrong = [name for name in found if found[name] != listed[name][now]]
    if not wrong:
        return
    if all(found[name] == listed[name][then] for name in found if listed[name][then] is not None):
        raise ValueError(
            f"{path} is applied already: revert_delta takes it off again"
            if then == "after"
            else f"{path} is not applied: the model is its base already"
        )
    remedy = (
        "load the base that the delta was saved for, or, for weights that each loading initialises "
        "anew, name them in save_delta(whole=...)"
        if then == "after"
        else "revert a delta before the model is changed further, or load the base again"
    )
    raise ValueError(
        f"{some(wrong)} of the model {'have' if len(wrong) > 1 else 'has'} other values than "
        f"{path} was saved for: {remedy}"
    )


def _inside(mask: SparseMask, name: str, index: Tensor) -> bool:
    """Whether the mask selects all of these entries."""
    if name not in mask:
        return not len(index)
    return bool(mask.dense(name).flatten()[index.to(mask[name].device)].all())


def _gaps(index: Tensor) -> Tensor:
    """Ascending positions as differences, in the smallest dtype that holds them."""
    gaps = index.diff(prepend=index.new_zeros(1))
    largest = int(gaps.max())
    small = (d for d in (torch.int16, torch.int32) if largest <= torch.iinfo(d).max)
    return gaps.to(next(small, torch.int64))


def _place(stored: Mapping[str, Tensor], name: str) -> Tensor | slice:
    """Where a tensor differs: at some positions, nowhere, or, stored whole, all over."""
    if "after." + name in stored:
        return slice(None)
    gaps = stored.get("gaps." + name, torch.empty(0, dtype=torch.int64))
    return gaps.to(torch.int64).cumsum(0)
