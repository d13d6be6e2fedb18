"""Safe files of named tensors: safetensors with a header, checked when read, never unpickled.

The header is one JSON text in the file's metadata: the format's version, what kind of file it is,
the names in their order (safetensors itself sorts them), further fields, and a SHA-256 over all of
that and every tensor's dtype, shape and bytes. A file that was cut, edited or is of another kind
is refused with a ValueError.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load", "save"]

VERSION = 1
_KEY = "fishkern"


def save(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> None:
    """Write the tensors, in their order, so that the file is whole or not there at all.

    Args:
        path: The file; one that is there is replaced.
        kind: What the file holds, asked for again by ``load``.
        tensors: Tensors of any dtype, from any device.
        fields: What else belongs in the header, as JSON can say it.
    """
    tensors = _own_memory(tensors)
    header = {"version": VERSION, "kind": kind, "names": list(tensors), "fields": fields}
    header["digest"] = _digest(header, tensors)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU and in the order they were saved in, and the header's fields.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not whole, not as it was written, or not of this kind and version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, kind, file.metadata())
            if sorted(file.keys()) != sorted(header["names"]):
                raise ValueError(f"{path} does not hold the tensors that its header lists{_AGAIN}")
            tensors = {name: file.get_tensor(name) for name in header["names"]}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut short, or is of another "
            f"format (pickles are never read){_AGAIN}"
        ) from error
    written = header.pop("digest")
    if _digest(header, tensors) != written:
        raise ValueError(f"{path} is not as it was written: its digest does not match{_AGAIN}")
    return tensors, header["fields"]


_AGAIN = ". Copy the file again, or save it anew."
_FIELDS = {"version": int, "kind": str, "names": list, "fields": dict, "digest": str}


def _header(path: Path, kind: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    """The parsed header, of a version and kind that can be read."""
    if not metadata or _KEY not in metadata:
        raise ValueError(f"{path} has no fishkern header: pass a file that fishkern saved")
    try:
        header = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ValueError(f"{path} has a damaged header ({error}){_AGAIN}") from error
    if not isinstance(header, dict) or "version" not in header:
        raise ValueError(f"{path} has a damaged header (no version){_AGAIN}")
    if header["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {header['version']!r}, this fishkern reads {VERSION}: "
            f"use the fishkern that wrote it, or a newer one"
        )
    for name, expected in _FIELDS.items():
        if not isinstance(header.get(name), expected):
            raise ValueError(f"{path} has a damaged header (no proper {name!r}){_AGAIN}")
    if not all(isinstance(name, str) for name in header["names"]):
        raise ValueError(f"{path} has a damaged header (no proper names){_AGAIN}")
    if header["kind"] != kind:
        raise ValueError(f"{path} holds a {header['kind']}, not a {kind}: pass a {kind} file")
    return header


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for tensor in tensors.values():
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors dense on the CPU; safetensors refuses two that share their memory."""
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return owned
