"""A CUDA graph of a training step, the optimizer's within, trains as the step itself does."""

import copy

import pytest
import torch

import fishkern
from tests.support.optim import make_mask, make_model
from tests.support.tolerances import MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # where a step was refused
]
STEPS = 6


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has graphs")
    return device


def build(way, model, **options):
    mask = None if way == "no_mask" else make_mask(model)
    if way == "leaves":
        fishkern.train_only(model, mask)
    return fishkern.FishSparseAdamW(model.named_parameters(), mask=mask, **options)


def trained(model):
    return [param for param in model.parameters() if param.requires_grad]


def give_grads(models, seed):
    """The same numbers to all, in the tensors that a graph may have captured."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*map(trained, models), strict=True):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(grad)


def twins(way, device, **options):
    """Two equal models after one step: of the plain optimizer, and of the capturable one."""
    models = [make_model().to(device)]
    models.append(copy.deepcopy(models[0]))
    rates = 0.1, torch.tensor(0.1, device=device)
    optimizers = [
        build(way, model, lr=lr, capturable=capturable, **options)
        for model, lr, capturable in zip(models, rates, (False, True), strict=True)
    ]
    give_grads(models, 0)
    stream = torch.cuda.Stream()  # capture wants work before it on another stream than the default
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for optimizer in optimizers:
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    return models, optimizers


def assert_same(models, optimizers):
    pairs = zip(*(model.state_dict().values() for model in models), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=MODEL, atol=MODEL)
    for a, b in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        assert float(a["step"]) == float(b["step"])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("way", ["no_mask", "mask", "leaves"])
def test_a_replayed_step_is_the_step(way, amsgrad, cuda):
    models, (plain, capturable) = twins(way, cuda, amsgrad=amsgrad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()  # captured, not run
    for step in range(1, STEPS):
        give_grads(models, step)
        rate = 0.1 / step
        plain.param_groups[0]["lr"] = rate
        capturable.param_groups[0]["lr"].fill_(rate)
        plain.step()
        graph.replay()
    assert_same(models, (plain, capturable))
    # What is selected nowhere is never stepped.
    counts = {float(e["step"]) for e in capturable.state.values() if e["exp_avg"].numel()}
    assert counts == {STEPS}


def test_a_replayed_step_heeds_the_scaler(cuda):
    models, (plain, capturable) = twins("mask", cuda)
    scale, found_inf = torch.tensor(8.0, device=cuda), torch.zeros((), device=cuda)
    capturable.grad_scale, capturable.found_inf = scale, found_inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    for step in range(1, STEPS):
        give_grads(models, step)
        for param in trained(models[1]):
            param.grad.mul_(scale)
        found_inf.fill_(float(step == 2))
        if step != 2:
            plain.step()
        graph.replay()
    assert_same(models, (plain, capturable))


def test_a_rate_that_is_a_number_is_captured(cuda):
    models, (plain, capturable) = twins("mask", cuda)
    plain.param_groups[0]["lr"] = capturable.param_groups[0]["lr"] = 0.03
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    for step in range(1, STEPS):
        give_grads(models, step)
        plain.step()
        graph.replay()
    assert_same(models, (plain, capturable))


def test_a_first_step_is_not_captured(cuda):
    model = make_model().to(cuda)
    optimizer = build("mask", model, capturable=True)
    give_grads([model], 0)
    match = "Call step.. once before capturing"
    with pytest.raises(RuntimeError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state


def test_a_step_that_counts_on_the_host_is_not_captured(cuda):
    _, (plain, _) = twins("mask", cuda)
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        plain.step()


@pytest.mark.parametrize("way", ["no_mask", "mask", "leaves"])
def test_a_state_loaded_on_the_device_goes_on(way, device):
    """Trained on the CPU, loaded and trained on the device; and back."""
    model = make_model()
    other = copy.deepcopy(model)
    optimizers = [build(way, each, lr=0.1) for each in (model, other)]
    for step in range(3):
        give_grads((model, other), step)
        for optimizer in optimizers:
            optimizer.step()
    moved = make_model().to(device)
    resumed = build(way, moved, lr=0.1)
    moved.load_state_dict(other.state_dict())
    resumed.load_state_dict(optimizers[1].state_dict())
    assert {e["exp_avg"].device.type for e in resumed.state.values()} == {device.type}
    for step in range(3, STEPS):
        give_grads((model, moved), step)
        optimizers[0].step()
        resumed.step()
    back = make_model()
    last = build(way, back, lr=0.1)
    back.load_state_dict(moved.state_dict())
    last.load_state_dict(resumed.state_dict())
    give_grads((model, back), STEPS)
    optimizers[0].step()
    last.step()
    assert_same((model, back), (optimizers[0], last))
