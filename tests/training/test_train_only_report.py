"""What handle.report() says about each tensor."""

import pytest
import torch
from torch import nn

from fishkern import SparseMask, train_only
from tests.support.training import Functional, functional_batch, functional_loss


def rows(handle):
    """Cells by tensor and layer type, a title row among them."""
    table = [line for line in handle.report().splitlines() if "  " in line.strip()]
    cells = [[cell for cell in line.split("  ") if cell] for line in table]
    return {(row[0].strip(), row[1].strip()): [c.strip() for c in row[2:]] for row in cells}


def test_columns_rows_and_what_they_cost():
    model = nn.Linear(10, 4)
    indices = {"weight": torch.tensor([3, 5, 13]), "bias": torch.tensor([1])}
    handle = train_only(model, SparseMask(indices, {"weight": (4, 10), "bias": (4,)}))
    found = rows(handle)
    trained, of, columns, row, kept, _, route = found["weight", "Linear"]
    assert [trained, of, columns, row, kept] == ["3", "40", "20.0%", "50.0%", "20.0%"]
    assert route in ("columns", "rows", "tiles")
    assert found["bias", "Linear"] == ["1", "4", "-", "-", "0.0%", "0.0%", "sums"]
    assert found["total", "4"] == []


def test_uses_that_form_the_dense_gradient_are_named():
    model = Functional()
    names = ("embedding.weight", "linear.weight", "norm.weight")
    params = dict(model.named_parameters())
    indices = {name: torch.arange(0, params[name].numel(), 5) for name in names}
    mask = SparseMask(indices, {name: params[name].shape for name in names})
    handle = train_only(model, mask, unlisted="freeze")
    functional_loss(model, functional_batch()).backward()
    found = {name: row[-1] for (name, _), row in rows(handle).items() if name in names}
    assert found["embedding.weight"].startswith("tokens of the batch; where it is read elsewhere")
    assert "dense" not in found["linear.weight"]
    assert found["norm.weight"] == "dense: formed, gathered, freed"


def test_a_tied_weight_has_a_row_for_each_of_its_layers():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    handle = train_only(model, SparseMask({"0.weight": torch.tensor([2, 7])}, {"0.weight": (6, 4)}))
    assert {("0.weight", "Embedding"), ("0.weight", "Linear")} <= set(rows(handle))
    model(torch.tensor([[1, 2]])).sum().backward()
    assert "dense" not in handle.report().replace("dense gradient's", "")


def test_an_unknown_layer_trains_by_the_dense_gradient():
    model = nn.PReLU(5)
    handle = train_only(model, SparseMask({"weight": torch.tensor([2])}, {"weight": (5,)}))
    assert rows(handle)["weight", "PReLU"][-1].startswith("dense")


def test_a_removed_handle_has_no_report():
    model = nn.Linear(3, 2)
    handle = train_only(model, SparseMask({"weight": torch.tensor([1])}, {"weight": (2, 3)}),
                        unlisted="freeze")  # fmt: skip
    handle.remove()
    with pytest.raises(RuntimeError, match="removed"):
        handle.report()
