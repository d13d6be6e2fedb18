"""Inputs that outlive a step: filled anew, saved, made without counted changes."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

from fishkern import SparseMask, attached, train_only
from fishkern.training import inputs
from tests.support.tolerances import assert_matches
from tests.support.training import leaf_gradients
from tests.training.test_train_only_inputs import I, N, Readers, T, check_gradients, column_mask

REFILLS = {
    "numpy": lambda x, values: x.numpy().__setitem__(slice(None), values.numpy()),
    "data": lambda x, values: x.data.copy_(values),
    "other data": lambda x, values: setattr(x, "data", values),
}


@pytest.mark.parametrize("refill", REFILLS.values(), ids=REFILLS)
def test_an_input_that_is_filled_anew_is_read_anew(refill):
    """No version counts these changes."""
    torch.manual_seed(0)
    model, x = Readers(), torch.randn(N, T, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    for _ in range(3):
        refill(x, torch.randn(N, T, I))
        check_gradients(model, truth, mask, x, lambda each, x: each(x))


class Latents(nn.Module):
    """Layers that read a parameter."""

    def __init__(self):
        super().__init__()
        self.latents, self.layers = nn.Parameter(torch.randn(T, I)), Readers()

    def forward(self):
        return self.layers(self.latents)


def test_a_parameter_that_layers_read_is_read_anew_after_each_step():
    """The fused optimizer counts no version up."""
    torch.manual_seed(0)
    model = Latents()
    few = column_mask(model)
    names = [name for name in few if name != "latents"]
    mask = SparseMask({n: few[n] for n in names}, {n: few.shapes[n] for n in names})
    train_only(model, mask, unlisted="train")
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    for _ in range(3):
        truth = copy.deepcopy(model)
        attached(truth).remove()
        truth.double().requires_grad_()
        model.zero_grad()
        for each in (model, truth):
            each().square().sum().backward()
        dense = {name: param.grad for name, param in truth.named_parameters()}
        for name, grad in leaf_gradients(model).items():
            assert_matches(grad, dense[name].flatten()[mask[name].long()], terms=T)
        optimizer.step()


def test_nothing_is_held_for_an_input_after_the_backward_pass():
    model, x = Readers(), torch.randn(N, T, I)
    train_only(model, column_mask(model))
    out = model(x)
    assert id(x) in inputs._found
    out.sum().backward()
    gc.collect()
    assert id(x) not in inputs._found
    model(x)  # its graph is dropped
    gc.collect()
    assert id(x) not in inputs._found


def test_an_input_is_saved_alone():
    model, x = Readers(), torch.randn(N, T, I)
    train_only(model, column_mask(model))
    out, file = model(x), io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)
    assert out.requires_grad


def test_features_of_inference_mode_are_read():
    torch.manual_seed(0)
    model = Readers()
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    x = torch.randn(N, T, I)
    with torch.inference_mode():
        features = x.clone()

    def forward(each, _):
        return each(features) if each is model else each(x.double())

    check_gradients(model, truth, mask, x, forward)


def test_second_derivatives_are_refused_and_taken_by_torch_func():
    """grad_out is constant here, so that torch's once_differentiable would let them be wrong."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Tanh(), nn.Linear(I, 1)), torch.randn(N, I)
    mask, truth = column_mask(model), copy.deepcopy(model).double()
    train_only(model, mask)
    leaf = x.double().requires_grad_()
    (slopes,) = torch.autograd.grad(truth(leaf).sum(), leaf, create_graph=True)
    slopes.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"create_graph=True: .* a Linear .*torch\.func\.grad"):
        torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
    torch.func.grad(lambda x: model(x).sum())(x.detach()).square().sum().backward()
    name = "1.weight"
    dense = truth[1].weight.grad.flatten()[mask[name].long()]
    assert_matches(leaf_gradients(model)[name], dense, terms=N)
