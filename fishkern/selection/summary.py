"""A mask as a table to read: what is selected, by layer and by type of module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from torch import Tensor

from fishkern.functional.selected_grad import plan_restricted

__all__ = ["layer_of", "summarize", "type_of"]

_BAR = 20


@dataclass
class _Group:
    """Sums over some tensors: entries, and of those that are matrices columns, rows and work."""

    selected: int = 0
    entries: int = 0
    used_columns: int = 0
    columns: int = 0
    used_rows: int = 0
    rows: int = 0
    work: float = 0.0
    dense_work: int = 0

    @classmethod
    def of(cls, index: Tensor, shape: torch.Size) -> _Group:
        """Those of one tensor."""
        group = cls(selected=len(index), entries=shape.numel())
        if len(shape) < 2 or shape.numel() == 0:
            return group
        rows, columns = shape[0], shape.numel() // shape[0]
        group.rows, group.columns, group.dense_work = rows, columns, rows * columns
        group.used_rows = _distinct(index.div(columns, rounding_mode="floor"), rows)
        group.used_columns = _distinct(index % columns, columns)
        if len(index):
            _, _, work = plan_restricted(index.cpu(), (rows, columns))
            group.work = work * rows * columns
        return group

    def add(self, other: _Group) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def summarize(indices: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> str:
    """The table: a line for the total, then one for each layer and for each type of module.

    Columns of the table: the share of the group's entries that is selected; how many; the share of
    all selected entries that lies in the group, also as a bar; the shares of its matrices' columns
    and rows that hold a selected entry (a matrix being [shape[0], *]); and the share of the work of
    their dense gradients that ``train_only`` is expected to do, on a CPU. The share of the columns
    is that of the layers' inputs which it keeps for the backward pass.
    """
    # Planning a matrix's work takes by far the longest: each tensor is looked at once.
    tensors = {name: _Group.of(index, shapes[name]) for name, index in indices.items()}
    total = _Group()
    for group in tensors.values():
        total.add(group)
    blocks = [{"total": total}]
    for key in (_shortened(layer_of, indices), type_of):
        groups: dict[str, _Group] = {}
        for name, group in tensors.items():
            groups.setdefault(key(name), _Group()).add(group)
        blocks.append(groups)
    width = max(len(label) for groups in blocks for label in groups)
    lines = [
        f"{'':{width}}  {'density':>8}  {'selected':>11}  {'of all':>6}  {'':{_BAR}}  "
        f"{'columns':>7}  {'rows':>6}  {'work':>6}"
    ]
    for title, groups in zip(("", "by layer", "by type of module"), blocks, strict=True):
        lines += [title] if title else []
        lines += [_line(label, g, width, total.selected) for label, g in groups.items()]
    return "\n".join(line.rstrip() for line in lines)


def layer_of(name: str) -> str:
    """The numbered block that a parameter is in, else the part of the model.

    Example:
        >>> layer_of("bert.encoder.layer.3.output.dense.weight"), layer_of("bert.pooler.dense.bias")
        ('bert.encoder.layer.3', 'bert.pooler')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-2] or parts[:1])


def type_of(name: str) -> str:
    """The kind of module: its name, with the adapter's beside it where there is one.

    Example:
        >>> type_of("bert.encoder.layer.3.attention.self.query.weight")
        'query'
        >>> type_of("encoder.layer.3.attention.self.query.lora_A.default.weight")
        'query.lora_A'
    """
    path = [part for part in name.split(".") if part != "base_layer" and not part.isdecimal()]
    for i, part in enumerate(path):
        if i > 0 and part.startswith(_ADAPTERS):
            return f"{path[i - 1]}.{part}"
    return (path[:-1] or path)[-1]


_ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "boft_", "hra_")


def _shortened(key: Callable[[str], str], names: Mapping[str, Tensor]) -> Callable[[str], str]:
    """The key without what all labels begin with."""
    labels = [key(name).split(".")[:-1] for name in names]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*labels, strict=False))
    cut = sum(len(parts[0]) + 1 for parts in common)
    return lambda name: key(name)[cut:]


def _line(label: str, group: _Group, width: int, selected: int) -> str:
    of_all = group.selected / max(selected, 1)
    bar = "#" * round(_BAR * of_all)
    columns, rows, work = (
        f"{used / count:.1%}" if count else "-"
        for used, count in (
            (group.used_columns, group.columns),
            (group.used_rows, group.rows),
            (group.work, group.dense_work),
        )
    )
    return (
        f"{label:{width}}  {group.selected / max(group.entries, 1):8.3%}  {group.selected:11,}  "
        f"{of_all:6.1%}  {bar:{_BAR}}  {columns:>7}  {rows:>6}  {work:>6}"
    )


def _distinct(positions: Tensor, size: int) -> int:
    hit = torch.zeros(size, dtype=torch.bool)
    hit[positions.long()] = True
    return int(hit.sum())
