"""Inputs of every layout and masks of every shape, by every route: the dense gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fishkern.functional.selected_grad as selected_grad
from fishkern import SparseMask, attached, train_only
from tests.support.tolerances import assert_matches
from tests.support.training import leaf_gradients, random_mask
from tests.training.test_train_only_inputs import I, N, Readers, T, column_mask, row_mask

LAYOUTS = {
    "one sample for all": lambda: torch.randn(1, T, I).expand(N, T, I),
    "one token for all": lambda: torch.randn(N, 1, I).expand(N, T, I),
    "one number for all": lambda: torch.randn(()).expand(N, T, I),
    "one vector": lambda: torch.randn(I),
    "no samples": lambda: torch.randn(0, T, I),
    "no tokens": lambda: torch.randn(N, 0, I),
    "transposed": lambda: torch.randn(I, N).t(),
    "tokens last": lambda: torch.randn(N, I, T).transpose(1, 2),
    "each second feature": lambda: torch.randn(N, T, 2 * I)[..., ::2],
    "each third sample": lambda: torch.randn(3 * N, T, I)[::3],
    "permuted": lambda: torch.randn(2, T, N, I).permute(2, 0, 1, 3),
    "overlapping": lambda: torch.randn(200).as_strided((N, T, I), (3, 2, 1)),
}


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("make_mask", [column_mask, row_mask, random_mask])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_every_layout(layout, make_mask, with_grad):
    torch.manual_seed(0)
    model = Readers()
    mask, truth = make_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for _ in range(2):
        x = LAYOUTS[layout]()
        exact = x.detach().double().requires_grad_(with_grad)
        x.requires_grad_(with_grad)
        for each, values in ((model, x), (truth, exact)):
            each.zero_grad()
            each(values).square().sum().backward()
        for name, grad in leaf_gradients(model).items():
            dense = truth.get_parameter(name).grad.flatten()
            # Of one number for all, terms of the sum cancel.
            assert_matches(grad, dense[mask[name].long()], terms=100 * N * T)
        if with_grad:
            assert_matches(x.grad, exact.grad, terms=100 * N * T)


MASKS = {
    "all": lambda m: m.fill_(True),
    "one": lambda m: m[-1, -1].fill_(True),
    "a column": lambda m: m[:, -1].fill_(True),
    "a row": lambda m: m[-1].fill_(True),
    "columns and rows": lambda m: (m[:, ::3].fill_(True), m[::5].fill_(True)),
    "diagonal": lambda m: m.fill_diagonal_(True),
    "most": lambda m: m.copy_(torch.rand(m.shape) < 0.9),
}
LAYERS = {"linear": lambda i, o: nn.Linear(i, o), "transposed": lambda i, o: Conv1D(o, i)}


@pytest.mark.parametrize("route", [None, "tiles", "columns", "rows"])
@pytest.mark.parametrize("sizes", [(12, 16), (1, 16), (12, 1), (1, 1), (130, 70)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_masks_of_every_shape_by_every_route(layer, sizes, route, monkeypatch):
    plan = selected_grad.plan_selected_grad
    if route is not None:
        forced = lambda *args, **kwargs: plan(*args, **{**kwargs, "route": route})  # noqa: E731
        monkeypatch.setattr(selected_grad, "plan_selected_grad", forced)
    for choose in MASKS.values():
        torch.manual_seed(0)
        model = LAYERS[layer](*sizes)
        chosen = torch.zeros(model.weight.shape, dtype=torch.bool)
        choose(chosen)
        indices = chosen.flatten().nonzero().view(-1)
        truth = copy.deepcopy(model).double()
        mask = SparseMask({"weight": indices}, {"weight": chosen.shape})
        train_only(model, mask, unlisted="freeze")
        for dtype, lead in ((torch.float32, (N, T)), (torch.float64, (T,)), (torch.float32, ())):
            model.zero_grad(), truth.zero_grad()
            x = torch.randn(*lead, sizes[0])
            grad_out = torch.randn(*lead, sizes[1])
            truth(x.double()).backward(grad_out.double())
            model.to(dtype)(x.to(dtype)).backward(grad_out.to(dtype))
            (leaf,) = attached(model).parameters()
            assert leaf.grad.dtype == torch.float32
            assert_matches(leaf.grad, truth.weight.grad.flatten()[indices], terms=N * T)
        found = model.fishkern_leaves.reader.selections["weight"].route
        assert route in (None, found)
