"""Which entries and features a route to selected gradients reads, and which route is cheapest."""

import pytest
import torch

from fishkern.functional import (
    linear_selected_grad_,
    plan_selected_grad,
    restrict_columns,
    restrict_rows,
)
from fishkern.functional.selected_grad import plan_restricted
from tests.kernels.test_linear_selected_grad import ROUTES, check, draw, problem, truth
from tests.support.tolerances import assert_matches


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_restrict_columns_there_and_back(density, dtype):
    shape = (23, 31)
    indices = draw(shape, density, dtype)
    columns, local = restrict_columns(indices, shape)
    assert columns.dtype == local.dtype == dtype
    assert columns.tolist() == sorted({i % 31 for i in indices.tolist()})
    assert (local[1:] > local[:-1]).all()
    width = max(len(columns), 1)
    back = [i // width * 31 + columns[i % width].item() for i in local.tolist()]
    assert back == indices.tolist()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_restrict_rows_there_and_back(density):
    indices = draw((23, 31), density)
    rows, local = restrict_rows(indices, (23, 31))
    assert rows.dtype == local.dtype == torch.int32
    assert rows.tolist() == sorted({i // 31 for i in indices.tolist()})
    assert [rows[i // 31].item() * 31 + i % 31 for i in local.tolist()] == indices.tolist()


def test_restricted_columns_give_the_same_gradient(backend):
    x, grad_out = problem(((3, 40), 20, 30))
    indices = draw((20, 30), 0.02)
    columns, local = restrict_columns(indices, (20, 30))
    assert 0 < len(columns) < 30
    check(x[..., columns.long()], grad_out, local)
    selected = torch.zeros(len(indices))
    linear_selected_grad_(selected, x[..., columns.long()], grad_out, local)
    assert_matches(selected, truth(x, grad_out)[indices.long()], terms=120)


def test_the_plan_takes_the_cheapest_route():
    shape = (400, 300)
    grid = torch.arange(400 * 300).view(shape)
    some = torch.arange(0, 400, 40)
    assert plan_selected_grad(grid[:, :5].flatten(), shape).route == "columns"
    assert plan_selected_grad(grid[:5].flatten(), shape).route == "rows"
    assert plan_selected_grad(grid[some][:, some[:7]].flatten(), shape).route == "tiles"
    assert plan_selected_grad(grid.flatten(), shape).route != "tiles"
    for indices in (grid[:, :5].flatten(), grid[::50, ::50].flatten()):
        costs = plan_selected_grad(indices, shape).costs
        assert set(costs) == set(ROUTES)
        assert costs[plan_selected_grad(indices, shape).route] == min(costs.values())


def test_the_plan_holds_what_the_route_reads():
    indices = torch.tensor([3, 8, 13, 14], dtype=torch.int32)  # of [4, 5]
    plans = {route: plan_selected_grad(indices, (4, 5), route=route) for route in ROUTES}
    assert plans["tiles"].indices is indices
    assert plans["tiles"].rows is plans["tiles"].columns is None
    assert plans["columns"].columns.tolist() == [3, 4]
    assert plans["columns"].indices.tolist() == [0, 2, 4, 5]
    assert plans["rows"].rows.tolist() == [0, 1, 2]
    assert plans["rows"].indices.tolist() == [3, 8, 13, 14]


@pytest.mark.parametrize("input_dim", [0, 1])
def test_a_layer_keeps_the_features_it_needs_or_all_if_they_are_most(input_dim):
    grid = torch.arange(40 * 60).view(40, 60)
    few, most = grid.narrow(input_dim, 3, 5).flatten(), grid.narrow(input_dim, 0, 39).flatten()
    kept, plan, work = plan_restricted(few, (40, 60), input_dim=input_dim)
    assert kept.tolist() == [3, 4, 5, 6, 7]
    assert plan.shape == ((5, 60), (40, 5))[input_dim]
    assert len(plan.indices) == len(few)
    assert work > 0
    if input_dim == 1:  # 39 of 60 are few enough
        most = grid[:, :50].flatten()
    kept, plan, _ = plan_restricted(most, (40, 60), input_dim=input_dim)
    assert kept is None
    assert plan.shape == (40, 60)


@pytest.mark.parametrize("indices", [[0, 6], [-1, 5], [5, 0], [5, 5]], ids=str)
def test_plans_and_restrictions_refuse_wrong_indices(indices):
    for make in (plan_selected_grad, restrict_columns, restrict_rows):
        with pytest.raises(ValueError, match="indices"):
            make(torch.tensor(indices), (2, 3))


def test_there_are_three_routes():
    with pytest.raises(ValueError, match=r"'diagonals'.*tiles, columns, rows"):
        plan_selected_grad(torch.arange(2), (2, 3), route="diagonals")
