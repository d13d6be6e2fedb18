"""The table of ``handle.report()``: each trained tensor, and how its gradient is formed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fishkern.interception import rule_for
from fishkern.training.layers import forward_by_rule
from fishkern.training.leaves import CHILD, INDICES

_TITLES = ("tensor", "layer", "trained", "of", "columns", "rows", "kept", "work", "gradient")
_WORDS = (0, 1, 8)  # columns that are aligned to the left
_DENSE = "dense: formed, gathered, freed"
_LEGEND = """\
columns, rows: those of the matrix that hold a selected entry
kept: the share of the layer's input that lives until backward, for all readers of the same tensor;
      nothing where it can be made again of what its maker keeps anyhow
work: the expected share of the dense gradient's cost"""


def report(places: Iterable[tuple[nn.Module, str, str]], indices: Mapping[str, Tensor]) -> str:
    """The table.

    Args:
        places: For each parameter its module, local name, and name in the model.
        indices: The selected entries by the names in the model.
    """
    rows = [
        _row(module, local, name, indices[name])
        for module, local, name in places
        if len(indices.get(name, ()))
    ]
    total = sum(len(index) for index in indices.values())
    table = [_TITLES, *rows, ("total", "", f"{total:,}", *[""] * 6)]
    widths = [max(len(row[i]) for row in table) for i in range(len(_TITLES))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i in _WORDS else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([*lines, "", _LEGEND])


def _row(module: nn.Module, local: str, name: str, index: Tensor) -> tuple[str, ...]:
    weight, leaves = module._parameters[local], _leaves(module)
    assert weight is not None
    columns = rows = "-"
    if weight.dim() == 2:
        columns = f"{len((index % weight.shape[1]).unique()) / weight.shape[1]:.1%}"
        row = index.div(weight.shape[1], rounding_mode="floor")
        rows = f"{len(row.unique()) / weight.shape[0]:.1%}"
    kept, work, gradient = "-", "-", _DENSE
    if type(module).forward is forward_by_rule:
        rule, reader = rule_for(module), leaves.reader
        assert rule is not None
        if reader is None:  # no training forward yet
            selection = rule.prepare(module, local, leaves._buffers[local + INDICES])
        else:
            selection = reader.selections[local]
        share = selection.kept if reader is None else reader.share_kept(local)
        kept, work, gradient = f"{share:.1%}", f"{selection.work:.1%}", selection.route
        if local in leaves.read_whole:
            gradient += f"; where it is read elsewhere, {_DENSE}"
    head = (name, type(module).__name__, f"{len(index):,}", f"{weight.numel():,}")
    return (*head, columns, rows, kept, work, gradient)


def _leaves(module: nn.Module) -> Any:
    return module._modules[CHILD]
