"""Training steps under ``torch.compile``, the optimizer's within: as without, compiled once."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import fishkern
from fishkern.optim import FishSparseAdamW
from tests.support.optim import make_mask, make_model

STEPS = 12  # more learning rates than a function is compiled for anew (8)
EAGER = {"backend": "eager"}  # so that gradients have the same bits

# What torch's own tracing warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["no_mask", "mask", "leaves", "stock_on_leaves"])
def build(request):
    """From a model make its optimizer."""

    def build(model):
        mask = None if request.param == "no_mask" else make_mask(model)
        if "leaves" in request.param:
            fishkern.train_only(model, mask)
        if request.param == "stock_on_leaves":
            return torch.optim.AdamW(fishkern.attached(model).parameters(), lr=0.1)
        return FishSparseAdamW(model.named_parameters(), lr=0.1, mask=mask)

    build.way = request.param
    return build


def train(model, optimizer, compiled):
    """STEPS steps, each with another learning rate; how many graphs were made after two."""
    data = [
        (torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator))
        for generator in [torch.Generator().manual_seed(0)]
        for _ in range(STEPS)
    ]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)

    def step(x, y):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    if compiled:
        step = torch.compile(step, **EAGER)
    before = 0
    for i, (x, y) in enumerate(data):
        step(x, y)
        schedule.step()
        if i == 1:
            before = graphs()
    return graphs() - before


def graphs():
    return counters["stats"]["unique_graphs"]


def test_a_compiled_training_step_is_the_plain_one(build):
    model = make_model()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    train(model, build(model), compiled=False)
    anew = train(twin, build(twin), compiled=True)
    assert graphs() > 0
    if build.way != "stock_on_leaves":  # torch makes its own anew for each learning rate
        assert anew == 0
    found, expected = twin.state_dict(), model.state_dict()
    moved = {name: p for name, p in start.state_dict().items() if not torch.equal(p, found[name])}
    assert len(moved) >= 5
    for name in expected:
        if "leaves" in build.way:  # rules stand aside there: dense gradients, rounded otherwise
            assert (found[name] - expected[name]).abs().max() < 1e-4
        else:
            assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_step_alone_runs_as_it_is(masked):
    """``torch.compile(optimizer.step)``, with everything that a plain one heeds."""
    models = [make_model()]
    models.append(copy.deepcopy(models[0]))
    mask = make_mask(models[0]) if masked else None
    optimizers = [
        FishSparseAdamW(model.named_parameters(), lr=torch.tensor(0.1), mask=mask)
        for model in models
    ]
    called = []
    optimizers[1].register_step_post_hook(lambda *_: called.append(1))
    steps = optimizers[0].step, torch.compile(optimizers[1].step, **EAGER)
    for i in range(STEPS):
        torch.manual_seed(i)
        for params in zip(*(model.parameters() for model in models), strict=True):
            grad = torch.randn_like(params[0])
            for param in params:
                param.grad = grad.clone()
        for optimizer, step in zip(optimizers, steps, strict=True):
            optimizer.param_groups[0]["lr"].mul_(0.9)
            step()
    assert len(called) == STEPS
    assert graphs() == 0  # nothing of it is traced, so nothing is compiled anew
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert [entry["step"] for entry in optimizers[1].state.values()] == [STEPS] * 6


def test_errors_of_a_compiled_step_are_those_of_a_plain_one():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    model[0].weight.grad = torch.zeros_like(model[0].weight).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        torch.compile(optimizer.step, **EAGER)()
