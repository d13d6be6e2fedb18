"""Selected entries of a linear layer's weight gradient, and the cheapest way to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fishkern import _ops  # noqa: F401  (registers torch.ops.fishkern)
from fishkern.functional.checks import check_accumulator

ROUTES = ("tiles", "columns", "rows")
# What a CPU takes to gather a number, and to read it, in multiply-adds of a large float32 product.
_GATHERING, _READING = 100, 8
_TILE = 64  # of the GPU's kernel, a side
# A larger share of a layer's input than this is kept as it is: a copy would save too little.
MOST_KEPT = 0.75


def restrict_columns(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The columns that hold a selected entry, and the entries' positions among these columns.

    Of its input a layer then needs ``x[..., columns]`` alone: that is all that has to be kept for
    the selected gradient, and ``linear_selected_grad_`` takes it with the second tensor.

    Args:
        indices: Ascending flat positions in the weight, int32 or int64 ``[k]``.
        shape: The weight's, ``(O, I)``.

    Returns:
        ``columns``, ascending ``[C]``, and ascending flat positions in ``[O, C]``, both of the
        dtype of ``indices``.

    Raises:
        ValueError: ``indices`` are out of range, not ascending, or not 1-D.
        TypeError: ``indices`` are not int32 or int64.

    Example:
        >>> import torch
        >>> indices = torch.tensor([1, 3, 5, 11])  # of [3, 4]: columns 1, 3, 1, 3
        >>> restrict_columns(indices, (3, 4))
        (tensor([1, 3]), tensor([0, 1, 2, 5]))
    """
    _check_indices(indices, shape)
    row, column = _rows_and_columns(indices, shape)
    columns, place = _used(column, shape[1])
    return columns.to(indices.dtype), (row * len(columns) + place).to(indices.dtype)


def restrict_rows(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows that hold a selected entry, and the entries' positions among these rows.

    As ``restrict_columns``, for ``grad_out[..., rows]`` - or for the input of a layer whose weight
    is transposed, ``[I, O]``.

    Args:
        indices: Ascending flat positions in the weight, int32 or int64 ``[k]``.
        shape: The weight's.

    Returns:
        ``rows``, ascending ``[R]``, and ascending flat positions in ``[R, shape[1]]``, both of the
        dtype of ``indices``.

    Raises:
        ValueError: ``indices`` are out of range, not ascending, or not 1-D.
        TypeError: ``indices`` are not int32 or int64.

    Example:
        >>> import torch
        >>> restrict_rows(torch.tensor([1, 3, 9, 11]), (3, 4))  # rows 0, 0, 2, 2
        (tensor([0, 2]), tensor([1, 3, 5, 7]))
    """
    _check_indices(indices, shape)
    row, column = _rows_and_columns(indices, shape)
    rows, place = _used(row, shape[0])
    return rows.to(indices.dtype), (place * shape[1] + column).to(indices.dtype)


def _rows_and_columns(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    flat, width = indices.long(), max(shape[1], 1)
    row = flat.div(width, rounding_mode="floor")
    return row, flat - row * width


def _used(features: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which of ``size`` features occur, ascending, and the place of each one given among them."""
    occurs = torch.zeros(size, dtype=torch.bool, device=features.device)
    occurs[features] = True
    return occurs.nonzero().squeeze(1), (occurs.cumsum(0) - 1)[features]


@dataclass(frozen=True, eq=False)
class SelectedGradPlan:
    """How the selected entries of one matrix get their gradient: see ``plan_selected_grad``.

    Attributes:
        route: "tiles", "columns" or "rows".
        shape: The matrix ``(O, I)``.
        indices: Flat positions in ``[rows, columns]``.
        rows: Those of the O outputs that are read; None: all.
        columns: Those of the I inputs that are read; None: all.
        costs: What each route was counted to cost, for one token, in multiply-adds of a large
            float32 product.
    """

    route: str
    shape: tuple[int, int]
    indices: Tensor
    rows: Tensor | None
    columns: Tensor | None
    costs: Mapping[str, int]


def plan_selected_grad(
    indices: Tensor,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    route: str | None = None,
) -> SelectedGradPlan:
    """Work out, once for a mask, the cheapest route to the gradient of the selected entries.

    * "tiles": only what holds a selected entry is computed: on a GPU the tiles of 64 x 64 that
      have one, on a CPU every entry by a dot product of its own;
    * "columns": ``x[..., columns]``, where some entry is selected in each column, times all of
      grad_out, and the selected entries gathered from the product ``[O, C]``;
    * "rows": the same with ``grad_out[..., rows]`` and the product ``[R, I]``.

    The costs are counted for one token, in multiply-adds of a large float32 product.
    With R rows and C columns that hold a selected entry, on a CPU, as measured on one thread::

        tiles    3 k + 25 (R + C)           3: no operand stays in registers; 25: packing a feature
        columns  O C + 8 max(O, C) + 100 C  8: reading the wider operand; 100: gathering a feature
        rows     R I + 8 max(R, I) + 100 R  (if it is not all of them)

    Where a CPU has matrix units for bfloat16, a quarter of the product and 14 are counted, not 8.
    Dtypes other than bfloat16 and float32 go by dot products on every route.

    On a GPU all routes run in one kernel, whose work is its tiles of b = 64 a side: b b for each
    one that is not empty, ``ceil(O) ceil(C)``, or ``ceil(R) ceil(I)``, where ceil(n) is the next
    multiple of b. Equal costs: the first of these.

    Args:
        indices: Ascending flat positions, int32 or int64 ``[k]``. The plan belongs to its device.
        shape: The matrix that they point into, ``(O, I)``: the weight, or what is left of it
            after ``restrict_columns``.
        dtype: What x and grad_out will be.
        route: Take this one, whatever it costs.

    Raises:
        ValueError: ``indices`` are out of range, not ascending or not 1-D, or there is no such
            route.
        TypeError: ``indices`` are not int32 or int64.

    Example:
        >>> import torch
        >>> plan = plan_selected_grad(torch.arange(0, 512 * 512, 512), (512, 512))
        >>> plan.route, plan.columns  # the whole first column
        ('columns', tensor([0]))
        >>> plan = plan_selected_grad(torch.arange(0, 512 * 512, 513), (512, 512))
        >>> plan.route, dict(plan.costs)  # the diagonal
        ('tiles', {'tiles': 27136, 'columns': 266240, 'rows': 266240})
    """
    if route is not None and route not in ROUTES:
        raise ValueError(f"no route is named {route!r}: choose one of {', '.join(ROUTES)}")
    columns, in_columns = restrict_columns(indices, shape)
    rows, in_rows = restrict_rows(indices, shape)
    if indices.device.type == "cpu":
        costs = _cpu_costs(len(indices), shape, len(rows), len(columns), dtype)
    else:
        costs = _gpu_costs(indices, shape, len(rows), len(columns))
    route = route or min(ROUTES, key=costs.__getitem__)
    found: tuple[Tensor, Tensor | None, Tensor | None] = (indices, None, None)
    if route == "columns":
        found = (in_columns, None, columns)
    elif route == "rows":
        found = (in_rows, rows, None)
    return SelectedGradPlan(route, shape, *found, costs=MappingProxyType(costs))


def plan_restricted(
    indices: Tensor,
    shape: tuple[int, int],
    *,
    input_dim: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, SelectedGradPlan, float]:
    """What to keep of a layer's input until the backward pass, and the plan for what is left.

    Args:
        indices: As for ``plan_selected_grad``.
        shape: The weight's.
        input_dim: Which dimension of it is the layer's input: 1, or 0 if the weight is transposed.
        dtype: What x and grad_out will be.

    Returns:
        The features to keep, ascending, or None for all; the plan, with positions in the matrix
        that is restricted to them; and the expected share of the dense gradient's cost, gathering
        included.

    Example:
        >>> import torch
        >>> columns, plan, work = plan_restricted(torch.arange(0, 512 * 512, 512), (512, 512))
        >>> columns, plan.shape, f"{work:.1%}"  # the whole first column
        (tensor([0]), (512, 1), '1.8%')
    """
    used, restricted = (restrict_rows, restrict_columns)[input_dim](indices, shape)
    kept: Tensor | None = used
    gathering, left = 0, list(shape)
    if len(used) > MOST_KEPT * shape[input_dim]:
        kept, restricted = None, indices
    else:
        left[input_dim] = len(used)
    plan = plan_selected_grad(restricted, (left[0], left[1]), dtype=dtype)
    dense = shape[0] * shape[1]
    if indices.device.type == "cpu":  # a GPU's costs are its tiles alone
        dense += _READING * max(shape)
        gathering = 0 if kept is None else _GATHERING * len(kept)
    return kept, plan, (plan.costs[plan.route] + gathering) / max(dense, 1)


def _cpu_costs(
    count: int, shape: tuple[int, int], rows: int, columns: int, dtype: torch.dtype
) -> dict[str, int]:
    tiles = 3 * count + 25 * (rows + columns)
    if dtype not in (torch.float32, torch.bfloat16):
        return dict.fromkeys(ROUTES, tiles)
    matrix_units = dtype == torch.bfloat16 and _has_matrix_units()

    def dense(long: int, short: int, whole: int) -> int:
        product, reading = long * short, max(long, short)
        product = product // 4 + 14 * reading if matrix_units else product + _READING * reading
        return product + _GATHERING * short * (short < whole)

    return {
        "tiles": tiles,
        "columns": dense(shape[0], columns, shape[1]),
        "rows": dense(shape[1], rows, shape[0]),
    }


def _has_matrix_units() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.11
    return capabilities is not None and bool(capabilities().get("amx_bf16", False))


def _gpu_costs(indices: Tensor, shape: tuple[int, int], rows: int, columns: int) -> dict[str, int]:
    def tiles(size: int) -> int:
        return -(-size // _TILE)

    row, column = _rows_and_columns(indices, shape)
    tile = row.div(_TILE, rounding_mode="floor") * tiles(shape[1])
    tile += column.div(_TILE, rounding_mode="floor")
    filled = torch.unique(tile).numel()
    area = _TILE * _TILE
    return {
        "tiles": filled * area,
        "columns": tiles(shape[0]) * tiles(columns) * area,
        "rows": tiles(rows) * tiles(shape[1]) * area,
    }


def linear_selected_grad_(
    selected_grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    indices: Tensor | SelectedGradPlan,
) -> None:
    """Add selected entries of a linear layer's weight gradient to ``selected_grad``, in place.

    For tokens p of all samples, input features i and output features o::

        selected_grad += (sum_p grad_out[p] x[p]^T).flatten()[indices]

    without the gradient ``[O, I]`` ever being there: the routes of ``plan_selected_grad`` compute
    only rows, columns or tiles that hold a selected entry, and at most 1 MiB of it at a time. A
    plan is worth making once for a mask; without one, the route is "tiles". Sums are taken in
    float32. One exception: in bfloat16, the dense products of "columns" and "rows" on a CPU are
    torch's, which rounds their sums once, as it does those of its own gradient. The result is the
    same from run to run, bit for bit.

    Args:
        selected_grad: Accumulator, float32 ``[k]``.
        x: The layer's input ``[*, I]``, any floating dtype and strides; or its columns
            ``[*, C]`` alone, with positions in ``[O, C]``: see ``restrict_columns``.
        grad_out: Gradient at the layer's output ``[*, O]``, as ``x``.
        indices: Ascending flat positions in ``[O, I]``, int32 or int64 ``[k]``, no two equal; or
            a plan made from them.

    Raises:
        ValueError: Shapes do not fit together, or indices are out of range, not ascending or
            twice there. Indices on a GPU, or inside ``torch.compile``, are not read here: those
            stop the op itself, with an error on a CPU and a device-side assertion on a GPU.
        TypeError: A dtype is not the one named above.

    Example:
        >>> import torch
        >>> x, grad_out = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
        >>> indices = torch.tensor([0, 4])
        >>> selected = torch.zeros(2)
        >>> linear_selected_grad_(selected, x, grad_out, indices)
        >>> dense = torch.einsum("nto,nti->oi", grad_out, x)
        >>> torch.testing.assert_close(selected, dense.flatten()[indices])
    """
    if x.dim() < 1 or grad_out.dim() != x.dim() or x.shape[:-1] != grad_out.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)} and grad_out {list(grad_out.shape)} must be [*, I] and [*, O] "
            f"with the same leading dimensions"
        )
    for name, tensor in (("x", x), ("grad_out", grad_out)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}: pass a floating-point tensor")
    shape = (grad_out.shape[-1], x.shape[-1])
    rows = columns = None
    if isinstance(indices, SelectedGradPlan):
        plan = indices
        if plan.shape != shape:
            raise ValueError(
                f"the plan is for a matrix {list(plan.shape)}, but grad_out and x make "
                f"{list(shape)}"
            )
        indices, rows, columns = plan.indices, plan.rows, plan.columns
    elif indices.device.type != "cpu":
        _check_form(indices)
        torch._assert_async(_valid(indices, shape), f"indices do not ascend inside {list(shape)}")
    elif torch.compiler.is_compiling():
        _check_form(indices)
    else:
        _check_indices(indices, shape)
    check_accumulator("selected_grad", selected_grad, tuple(indices.shape))
    torch.ops.fishkern.linear_selected_grad_(
        selected_grad, x, grad_out, indices, rows=rows, columns=columns
    )


def _check_form(indices: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices have dtype {indices.dtype}: pass int32 or int64")
    if indices.dim() != 1:
        raise ValueError(f"indices have shape {list(indices.shape)}: pass flat positions [k]")


def _valid(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    inside = (indices >= 0) & (indices < shape[0] * shape[1])
    return inside.all() & (indices[1:] > indices[:-1]).all()


def _check_indices(indices: Tensor, shape: tuple[int, int]) -> None:
    _check_form(indices)
    if len(indices) == 0:
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("indices must ascend, and none may be there twice: sort them")
    for value in (int(indices[0]), int(indices[-1])):
        if not 0 <= value < shape[0] * shape[1]:
            raise ValueError(f"indices hold {value}, but the matrix is {list(shape)}")
