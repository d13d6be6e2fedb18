"""On a CUDA device everything is as on the CPU."""

import copy

import pytest
import torch
from torch import nn

import fishkern
from tests.support.optim import make_mask, make_model
from tests.support.oracle import fisher_oracle
from tests.support.problems import PROBLEMS, bert, classes
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
STEPS = 5
OPERATIONS = 12  # of a step, each with a rounding


def on_both(device, dtype=torch.float32):
    """The same model on the CPU and on the device."""
    model = make_model(dtype)
    return model, copy.deepcopy(model).to(device)


def give_grads(models, seed):
    """The same gradients to all: from a backward pass each they would differ by rounding."""
    torch.manual_seed(seed)
    for params in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(params[0].shape)
        for param in params:
            param.grad = grad.to(param, copy=True)


def assert_same(models, dtype=torch.float32):
    cpu, other = models
    for (name, a), b in zip(cpu.named_parameters(), other.parameters(), strict=True):
        assert b.isfinite().all(), name
        assert_matches(b.detach().cpu(), a.detach(), dtype, terms=STEPS * OPERATIONS)


def to(batch, device):
    return {key: value.to(device) for key, value in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
def test_optimizer_steps_as_on_the_cpu(device, masked, options, dtype):
    models = on_both(device, dtype)
    mask = make_mask(models[0]) if masked else None
    optimizers = [
        fishkern.FishSparseAdamW(model.named_parameters(), mask=mask, **options) for model in models
    ]
    for step in range(STEPS):
        give_grads(models, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(models, dtype)
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    for a, b in zip(*states, strict=True):
        assert b["exp_avg"].device.type == device.type
        assert float(a["step"]) == float(b["step"]) == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert_matches(b[key].cpu(), a[key], terms=STEPS * OPERATIONS)


def test_optimizer_leaves_the_rest_alone(device):
    model = make_model().to(device)
    before = [p.detach().clone() for p in model.parameters()]
    mask = make_mask(model)
    optimizer = fishkern.FishSparseAdamW(model.named_parameters(), mask=mask)
    give_grads([model], 0)
    optimizer.step()
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        changed = (param.detach() != old).view(-1).nonzero()[:, 0]
        assert torch.equal(changed.cpu(), mask[name].long().cpu()), name


@pytest.mark.parametrize("name", ["bert", "bert-lora", "gpt2", "llama-tied", "opt"])
def test_scores_as_on_the_cpu(device, name):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(), problem.batch()]
    moved = [to(batch, device) for batch in batches]
    scores = fishkern.estimate_fisher(
        copy.deepcopy(model).to(device), moved, progress=False, **problem.kwargs
    )
    assert all(t.device.type == device.type for t in scores.values())
    assert_scores_match(scores, fisher_oracle(model, batches, problem.loss, list(scores)))


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_labels_of_the_model_itself(device, labels):
    """By a generator of the CPU, too; the two devices draw different labels."""
    model, batch = bert(), classes(64)
    on_cpu = fishkern.estimate_fisher(model, [batch], labels=labels, progress=False)
    found = [
        fishkern.estimate_fisher(
            copy.deepcopy(model).to(device),
            [to(batch, device)],
            labels=labels,
            generator=torch.Generator().manual_seed(0),
            progress=False,
        )
        for _ in range(2)
    ]
    assert_scores_match(found[1], {name: t.double().cpu() for name, t in found[0].items()})
    if labels == "expected":
        assert_scores_match(found[0], {name: t.double() for name, t in on_cpu.items()})


def test_the_recipe_moves_batches_to_the_model(device):
    model = bert().to(device)
    optimizer = fishkern.create_fish_optimizer(
        model, [classes(), classes()], density=0.1, lr=1e-3, num_samples=8, warmup_steps=3,
        progress=False,
    )  # fmt: skip
    assert {t.device.type for t in optimizer.fisher.values()} == {device.type}


def test_baseline_scores_as_on_the_cpu(device):
    model, batch = bert(), classes()
    on_cpu, found = (
        fishkern.baseline_scores(m, [batch], kind="gradient", progress=False)
        for m in (model, copy.deepcopy(model).to(device))
    )
    assert_scores_match(found, {name: t.double() for name, t in on_cpu.items()})


def test_scores_on_the_host(device):
    problem = PROBLEMS["bert-lora"]
    model = problem.model().to(device)
    batches = [to(problem.batch(), device)]
    beside = fishkern.estimate_fisher(model, batches, progress=False)
    host = fishkern.estimate_fisher(model, batches, progress=False, score_device="cpu")
    for name, t in host.items():
        assert t.device.type == "cpu"
        assert torch.equal(t, beside[name].cpu()), name


def test_scores_on_the_host_hold_one_layer_on_the_device(device):
    """At most the largest layer's buffer lies beside the model, never all scores."""
    if device.type != "cuda":
        pytest.skip("scores on the host lie beside the model")
    problem = PROBLEMS["bert"]
    model = problem.model().to(device)
    batches = [to(problem.batch(), device)]
    peaks = {}
    for where in ("cpu", None):
        fishkern.estimate_fisher(model, batches, progress=False, verify=0, score_device=where)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fishkern.estimate_fisher(model, batches, progress=False, verify=0, score_device=where)
        peaks[where] = torch.cuda.max_memory_allocated() - before
    sizes = sorted(4 * p.numel() for p in model.parameters())
    assert peaks["cpu"] < peaks[None] - sum(sizes[:-2])


def test_scoring_selecting_and_training(device):
    problem = PROBLEMS["bert"]
    model, batch = problem.model().to(device), to(problem.batch(), device)
    mask = fishkern.select(
        fishkern.estimate_fisher(model, [batch], progress=False), density=0.1, keep="classifier*"
    )
    optimizer = fishkern.FishSparseAdamW(model.named_parameters(), lr=1e-2, mask=mask)
    losses = []
    for _ in range(10):
        loss = problem.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_train_only_as_on_the_cpu(device):
    models = on_both(device)
    mask = make_mask(models[0])
    x = torch.randn(16, 6)
    handles = [fishkern.train_only(model, mask) for model in models]
    optimizers = [fishkern.FishSparseAdamW(model.named_parameters(), mask=mask) for model in models]
    for model, handle, optimizer in zip(models, handles, optimizers, strict=True):
        weight = model[0].weight
        model(x.to(weight.device)).square().mean().backward()
        assert all(leaf.device == weight.device for leaf in handle.parameters())
        assert all(leaf.grad is not None for leaf in handle.parameters())
        optimizer.zero_grad(set_to_none=False)
    leaves = [nn.ParameterList(handle.parameters()) for handle in handles]
    for step in range(STEPS):
        give_grads(leaves, step)
        for optimizer in optimizers:
            optimizer.step()
    for handle in handles:
        handle.remove()
    assert_same(models)


def test_train_only_gradients_as_on_the_cpu(device):
    models = on_both(device)
    mask, x = make_mask(models[0]), torch.randn(16, 6)
    grads = []
    for model in models:
        with fishkern.train_only(model, mask) as handle:
            model(x.to(next(model.parameters()).device)).square().mean().backward()
            grads.append([leaf.grad.cpu() for leaf in handle.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_matches(b, a, terms=x.numel())


def test_train_only_compares_nothing_after_a_step(device, monkeypatch):
    """What the step has written is not read again by the next forward."""
    if device.type != "cuda":
        pytest.skip("on a CPU comparing is cheap, and done")
    model, x = make_model().to(device), torch.randn(16, 6, device=device)
    fishkern.train_only(model, make_mask(model).to(device))
    optimizer = fishkern.FishSparseAdamW(model.named_parameters())
    for step in range(3):
        if step == 2:
            monkeypatch.setattr("fishkern.training.leaves.gather", None)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler(device, capturable):
    models = on_both(device)
    mask = make_mask(models[0])
    plain, scaled = (
        fishkern.FishSparseAdamW(model.named_parameters(), mask=mask, capturable=capturable)
        for model in models
    )
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
    scaler.scale(torch.ones((), device=device))  # makes the scale
    for step in range(STEPS):
        give_grads(models, step)
        for param in models[1].parameters():
            param.grad *= scaler.get_scale()
        if step == 2:  # infinite: skipped by the scaler, and here by hand
            models[1][0].weight.grad[0, 0] = float("inf")
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same(models)
    counts = [float(entry["step"]) for entry in scaled.state.values()]
    assert counts == [STEPS - 1] * len(counts)


def test_current_stream_is_used(device):
    if device.type != "cuda":
        pytest.skip("only CUDA has streams")
    models = on_both(device)
    mask = make_mask(models[0])
    cpu, cuda = (fishkern.FishSparseAdamW(model.named_parameters(), mask=mask) for model in models)
    give_grads(models, 0)
    right = [param.grad.clone() for param in models[1].parameters()]
    x, grad_out = torch.randn(5, 7, 9, device=device), torch.randn(5, 7, 3, device=device)
    late, fisher = torch.zeros_like(x), torch.zeros(3, 9, device=device)
    for param in models[1].parameters():
        param.grad.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever works on another stream reads zeros
        late.copy_(x)
        for param, grad in zip(models[1].parameters(), right, strict=True):
            param.grad.copy_(grad)
        fishkern.functional.linear_fisher_(fisher, late, grad_out)
        cuda.step()
    stream.synchronize()
    cpu.step()
    assert_same(models)
    truth = torch.einsum("nto,nti->noi", grad_out.double(), x.double()).square().sum(0)
    assert_matches(fisher.cpu(), truth.cpu(), terms=5 * 7)


def test_default_device(device):
    """Tensors that steps make for themselves are where they belong, whatever the default is."""
    model = make_model().to(device)
    optimizer = fishkern.FishSparseAdamW(model.named_parameters(), mask=make_mask(model))
    give_grads([model], 0)
    elsewhere = "meta" if device.type == "cpu" else device
    before = model[0].weight.detach().clone()
    with torch.device(elsewhere):
        optimizer.step()
    assert not torch.equal(model[0].weight.detach(), before)
