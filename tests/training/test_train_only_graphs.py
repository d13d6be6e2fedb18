"""Attached models under torch.compile, torch.func and resizing: the same gradients, or an error."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

from fishkern import FishSparseAdamW, SparseMask, attached, train_only
from tests.support.problems import PROBLEMS
from tests.support.tolerances import MODEL, assert_matches
from tests.support.training import CASES, distance, leaf_gradients, random_mask, weights

# What torch's own tracing warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


def compiled(model, **kwargs):
    torch._dynamo.reset()
    return torch.compile(model, **({"backend": "aot_eager", "fullgraph": True} | kwargs))


@pytest.mark.parametrize("name", ["bert-lora", "functional", "gpt2", "llama-tied"])
def test_a_compiled_model_has_the_same_gradients_in_one_graph(name):
    problem = CASES[name]
    torch.manual_seed(1)
    model = problem.model().eval()
    batch = problem.batch()
    train_only(model, random_mask(model))
    problem.loss(model, batch).backward()
    plain = {name: value.double() for name, value in leaf_gradients(model).items()}
    model.zero_grad()
    problem.loss(compiled(model), batch).backward()
    for name, value in leaf_gradients(model).items():
        assert value.count_nonzero() or not plain[name].count_nonzero()
        scale = max(v.abs().max() for v in plain.values())
        assert (value - plain[name]).abs().max() <= MODEL * scale, name


@pytest.mark.parametrize("make", [torch.optim.AdamW, FishSparseAdamW])
def test_a_compiled_model_trains_as_the_plain_one(make):
    model, x = mlp(), torch.randn(3, 4)
    twin, mask = copy.deepcopy(model), random_mask(model)
    for each, call in ((model, lambda m: m), (twin, compiled)):
        optimizer = make(train_only(each, mask).parameters(), lr=0.1)
        forward = call(each)
        for _ in range(3):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    assert distance(weights(model), weights(twin)) < MODEL / 10


def test_a_compiled_model_sees_what_is_loaded():
    model, x = mlp(), torch.randn(3, 4)
    start, mask = weights(model), random_mask(model)
    handle = train_only(model, mask)
    forward = compiled(model)
    before = forward(x)
    with torch.no_grad():
        for leaf in handle.parameters():
            leaf.add_(1.0)
    handle.sync()
    assert not torch.equal(forward(x), before)
    model.load_state_dict(start)
    assert_matches(forward(x), before.detach().double())


@pytest.fixture
def functional():
    """A model, its leaves' values, and its loss as a function of them."""
    torch.manual_seed(0)
    model = mlp()
    handle = train_only(model, random_mask(model))
    values = {name: leaf.detach().clone() for name, leaf in handle.named_parameters()}
    return model, values, lambda p, x: functional_call(model, p, (x,)).square().sum()


def test_functional_gradients_are_those_of_backward(functional):
    model, values, loss = functional
    x = torch.randn(3, 4)
    gradients = grad(loss)(values, x)
    model(x).square().sum().backward()
    for name, leaf in attached(model).named_parameters():
        assert_matches(gradients[name], leaf.grad.double())


def test_functional_call_computes_with_the_leaves_it_is_given(functional):
    model, values, loss = functional
    x, before = torch.randn(3, 4), weights(model)
    moved = {name: value + 0.5 for name, value in values.items()}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, leaf in attached(expected).named_parameters():
            leaf.copy_(moved[name])
    assert_matches(loss(moved, x), expected(x).square().sum().detach().double())
    assert distance(weights(model), before) == 0  # and leaves its own alone


def test_gradients_sample_by_sample(functional):
    _, values, loss = functional
    x = torch.randn(5, 4)
    found = vmap(grad(loss), in_dims=(None, 0))(values, x)
    for n in range(len(x)):
        alone = grad(loss)(values, x[n])
        together = [torch.cat([g.flatten() for g in grads.values()])
                    for grads in ({name: found[name][n] for name in alone}, alone)]  # fmt: skip
        assert_matches(together[0], together[1].double())


def test_second_derivatives(functional):
    _, values, loss = functional
    name, x = "0.fishkern_leaves.weight", torch.randn(3, 4)
    values = {name: value.double() for name, value in values.items()}
    found = hessian(lambda v: loss(values | {name: v}, x))(values[name])
    shift = torch.zeros_like(values[name])
    shift[0] = 1e-3
    ends = [grad(loss)(values | {name: values[name] + s}, x)[name] for s in (shift, -shift)]
    assert_matches(found[0], ((ends[0] - ends[1]) / 2e-3).double(), torch.bfloat16)
    assert found.abs().max() > 1e-3


def test_gradients_at_the_input(functional):
    model, _, _ = functional
    x = torch.randn(3, 4)
    found = grad(lambda x: model(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert_matches(found, leaf.grad.double())


def test_functional_call_leaves_the_leaves_alone():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    before = leaf.detach().clone()
    weight = torch.zeros(4, 4, requires_grad=True)
    functional_call(model, {"weight": weight}, (torch.ones(1, 4),)).sum().backward()
    assert torch.equal(leaf, before)
    assert leaf.grad is None
    assert weight.grad.tolist() == [[1.0] * 4] * 4


def test_data_assigned_to_a_weight_reaches_it():
    model = nn.Linear(4, 4)
    mask = SparseMask({"weight": torch.tensor([2, 9])}, {"weight": (4, 4)})
    (leaf,) = train_only(model, mask, unlisted="freeze").parameters()
    model.weight.data = torch.full((4, 4), 7.0)
    assert model(torch.ones(1, 4)).sub(model.bias).tolist() == [[28.0] * 4]
    assert leaf.tolist() == [7.0, 7.0]
    model.weight.data += 1.0  # in place, and then assigned
    assert model.state_dict()["weight"].tolist() == [[8.0] * 4] * 4
    with pytest.raises(RuntimeError, match=r"\[5, 4\].*\[4, 4\].*resize the model first"):
        model.weight.data = torch.zeros(5, 4)
    assert model._parameters["weight"].shape == (4, 4)


def test_resized_token_embeddings_are_refused_and_nothing_changed():
    model = PROBLEMS["gpt2"].model()
    train_only(model, random_mask(model))
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"\[60, 16\].*\[50, 16\].*resize the model first"):
        model.resize_token_embeddings(60, mean_resizing=False)
    assert distance(weights(model), before) == 0
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 50


def test_a_weight_of_another_shape_is_refused_and_can_be_removed():
    problem = PROBLEMS["gpt2"]
    model = problem.model()
    handle, batch = train_only(model, random_mask(model)), problem.batch()
    before = weights(model)["transformer.wte.weight"]
    with torch.no_grad():  # where the parameter itself is read
        model.resize_token_embeddings(60, mean_resizing=False)
    with pytest.raises(RuntimeError, match=r"Embedding has shape \[60, 16\].*had \[50,.*remove"):
        model(**batch)
    handle.remove()
    assert torch.equal(weights(model)["transformer.wte.weight"][:50], before)
    assert model(**batch).logits.shape[-1] == 60
