"""The selected entries of a weight matrix, prepared for ``linear_selected_grad_``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fishkern import _ops
from fishkern.functional.selected_grad import SelectedGradPlan, plan_restricted
from fishkern.interception.rules import Selection


@dataclass(frozen=True, eq=False)
class Matrix:
    """A route to the entries of a matrix ``[O, I]``: its rows and columns that are used.

    The entries' positions among these are worked out in each backward pass: that takes a
    thousandth of it, and 4 bytes for each entry less than to hold them.

    Attributes:
        rows: The features of grad_out that the kernel reads; None: all.
        columns: Those of x, which may have been restricted before.
        row_places: Where each of the O rows is among those used ``[O]``; None: where it was.
        column_places: The same of the columns ``[I]``.
        width: I.
        used: How many columns are used.
    """

    rows: Tensor | None
    columns: Tensor | None
    row_places: Tensor | None
    column_places: Tensor | None
    width: int
    used: int

    def positions(self, indices: Tensor) -> Tensor:
        """Flat positions among the rows and columns that are used."""
        if self.row_places is self.column_places is None and self.used == self.width:
            return indices
        row = indices.div(self.width, rounding_mode="floor")
        column = indices.sub(row, alpha=self.width)
        row = row if self.row_places is None else self.row_places.index_select(0, row)
        if self.column_places is not None:
            column = self.column_places.index_select(0, column)
        return column.add(row, alpha=self.used)


def select_matrix(indices: Tensor, weight: Tensor, *, input_dim: int) -> Selection:
    """Choose what is kept of the layer's input, and the route.

    Costs are counted for the weight's dtype: autocast's is not known yet.

    Args:
        indices: Flat positions in the weight.
        weight: The matrix.
        input_dim: Which dimension of it is the layer's input: 1, or 0 if it is transposed.
    """
    shape = (weight.shape[0], weight.shape[1])
    kept, plan, work = plan_restricted(indices, shape, input_dim=input_dim, dtype=weight.dtype)
    share = 1.0 if kept is None else len(kept) / shape[input_dim]
    return Selection(indices, kept, _matrix(indices, shape, plan), plan.route, share, work)


def _matrix(indices: Tensor, shape: tuple[int, int], plan: SelectedGradPlan) -> Matrix:
    width = plan.shape[1] if plan.columns is None else len(plan.columns)
    row, new_row = (
        flat.div(size, rounding_mode="floor")
        for flat, size in ((indices, shape[1]), (plan.indices, width))
    )
    row_places = _places(row, new_row, shape[0])
    column_places = _places(indices - row * shape[1], plan.indices - new_row * width, shape[1])
    return Matrix(plan.rows, plan.columns, row_places, column_places, shape[1], width)


def _places(old: Tensor, new: Tensor, size: int) -> Tensor | None:
    """A table ``[size]`` that leads from each of the old positions to the new one."""
    if torch.equal(old, new):
        return None
    places = torch.zeros(size, dtype=new.dtype, device=new.device)
    places[old] = new
    return places


def matrix_grad(selection: Selection, x: Tensor, grad_out: Tensor) -> Tensor:
    """The selected entries of ``sum_p grad_out[p] x[p]^T``, in float32 at least."""
    matrix = selection.plan
    assert isinstance(matrix, Matrix)
    positions = matrix.positions(selection.indices)
    rows, columns = matrix.rows, matrix.columns
    # No kernel has float64, or vmap's tensors, as under is_grads_batched=True.
    if torch.float64 in (x.dtype, grad_out.dtype) or _is_batched(x) or _is_batched(grad_out):
        g = grad_out if rows is None else grad_out[..., rows]
        x = x if columns is None else x[..., columns]
        dense = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(g.dtype)
        return dense.view(-1)[positions]
    selected = grad_out.new_zeros(len(positions), dtype=torch.float32)
    _ops.linear_selected_grad_(selected, x, grad_out, positions, rows=rows, columns=columns)
    return selected


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors under a vmap, also that of ``torch.autograd.grad``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
