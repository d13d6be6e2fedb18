"""Scoring leaves the model, and the rest of the process, as they were - whatever happens."""

import random
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fishkern
from fishkern import estimate_fisher
from fishkern.scoring.preserve import NO_DROPOUT
from fishkern.scoring.torch_functions import handling
from tests.support.oracle import squared_error
from tests.support.problems import PROBLEMS, llama

N, T, I = 4, 5, 3  # samples, tokens, features  # noqa: E741


class Layers(nn.Module):
    """A bit of everything that scoring could leave changed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(I, I), nn.BatchNorm1d(I)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(I, I)
        self.slope = nn.PReLU()  # which no rule knows
        self.frozen = nn.Linear(I, I)
        self.functional = nn.Parameter(torch.randn(I))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)
        self.longest = 0

    def forward(self, x):
        self.calls += 1
        self.hidden.data += 1  # without a trace in the version counter
        self.replaced, self.absent, self.longest = torch.ones(3), torch.ones(1), x.shape[1]
        random.random()
        np.random.rand()
        torch.rand(())
        x = self.norm(self.first(x).mT).mT
        if self.training:
            self.norm.running_mean += 1
        return self.last(self.slope(self.frozen(self.drop(x)))) * self.functional


def made():
    model = Layers().train()
    model.drop.eval()  # modes differ
    model.frozen.requires_grad_(False)
    for n, param in enumerate(model.parameters()):
        if n % 2:
            param.grad = torch.randn_like(param)
    model.first.weight.register_hook(lambda grad: grad)
    model.first.register_forward_hook(lambda *_: torch.ones(()) and None)
    model.last.register_full_backward_hook(lambda *_: torch.ones(()) and None)
    return model


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAM_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def state(model):
    """What must be the same afterwards: objects by identity, tensors bit for bit."""
    modules = {}
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not isinstance(v, (dict, OrderedDict))}
        hooks = {h: dict(getattr(module, h)) for h in HOOKS}
        modules[path] = type(module), list(vars(module)), plain, hooks
    params = {
        name: (id(p), p.requires_grad, id(p.grad), [dict(getattr(p, h) or {}) for h in PARAM_HOOKS])
        for name, p in model.named_parameters()
    }
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {path: {n: id(b) for n, b in m._buffers.items()} for path, m in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    process = (
        hash(random.getstate()),
        hash(bytes(torch.get_rng_state().numpy())),
        hash(np.random.get_state()[1].tobytes()),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        list(warnings.filters),
        torch.overrides._len_torch_function_stack(),
    )
    return {"modules": modules, "params": params, "buffers": buffers, "process": process}, {
        **grads,
        **{f"state.{name}": value for name, value in values.items()},
    }


def assert_unchanged(model, before):
    objects, tensors = state(model)
    for kind, expected in before[0].items():
        assert objects[kind] == expected, kind
    assert tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


def batches(count=3):
    return [(torch.randn(N, T, I), torch.randn(N, T, I)) for _ in range(count)]


def test_after_success():
    model, data = made(), batches()
    before = state(model)
    scores = estimate_fisher(model, data, loss_fn=squared_error, progress=False)
    assert set(scores.routes.values()) == {"fused", "vmap"}
    assert_unchanged(model, before)


def test_random_states_do_not_depend_on_the_order_of_shuffled_batches():
    model = made()
    data = torch.utils.data.TensorDataset(torch.randn(8, T, I), torch.randn(8, T, I))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    before = state(model)
    estimate_fisher(model, loader, loss_fn=squared_error, progress=False)
    assert_unchanged(model, before)


class Stop(Exception):
    pass


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("at", range(1, 12))
def test_after_an_exception_in_the_losses(at, verify):
    model, data, calls = made(), batches(9), []

    def loss_fn(model, batch):
        calls.append(batch)
        losses = squared_error(model, batch)
        if len(calls) == at:
            raise Stop("mine")
        return losses

    before = state(model)
    with pytest.raises(Stop, match="mine"):
        estimate_fisher(model, data, loss_fn=loss_fn, verify=verify, progress=False)
    assert_unchanged(model, before)


def test_after_an_exception_in_the_batches():
    model = made()

    def broken(first):
        yield first
        raise Stop("no more data")

    data = broken(batches(1)[0])
    before = state(model)
    with pytest.raises(Stop, match="no more data"):
        estimate_fisher(model, data, loss_fn=squared_error, progress=False)
    assert_unchanged(model, before)


class Interrupt(torch.autograd.Function):
    """Ctrl-C in the middle of a backward pass, the ``left``-th time."""

    left = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Interrupt.left -= 1
        if Interrupt.left == 0:
            raise KeyboardInterrupt
        return grad


@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_after_ctrl_c_in_a_backward_pass(at):
    model, data = made(), batches()

    def loss_fn(model, batch):
        x, y = batch
        x = model.norm(model.first(x).mT).mT
        out = model.last(model.frozen(Interrupt.apply(x))) * model.functional
        return (out - y).square().flatten(1).sum(1)

    Interrupt.left = at
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model, data, loss_fn=loss_fn, progress=False)
    assert_unchanged(model, before)
    again = estimate_fisher(model, batches(1), loss_fn=squared_error, progress=False)
    assert again["first.weight"].count_nonzero()


class InterruptAt(TorchFunctionMode):
    """Raises at the ``at``-th call of torch, wherever that is; 0: notes who calls.

    Not while the model is being put back: from the end of the batches on.
    """

    def __init__(self, at, error=None):
        super().__init__()
        self.at, self.error, self.callers, self.done = at, error, [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not self.done:
            self.callers.append(self.caller())
            if len(self.callers) == self.at:
                self.done = True
                raise self.error
        return func(*args, **(kwargs or {}))

    def caller(self):
        """The innermost line of the package or of this file: (file, line)."""
        frame = sys._getframe(2)
        while frame.f_code.co_name == "__torch_function__" or not (
            frame.f_code.co_filename.startswith((PACKAGE, __file__))
        ):
            frame = frame.f_back
        return frame.f_code.co_filename, frame.f_lineno

    def watched(self, batches):
        yield from batches
        self.done = True


PACKAGE = fishkern.__path__[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_after_an_interrupt_at_any_line_that_calls_torch(error):
    def run(mode):
        torch.manual_seed(0)
        model, data = made(), batches(2)
        before = state(model)
        try:
            with mode:
                estimate_fisher(model, mode.watched(data), loss_fn=squared_error, progress=False)
        except error:
            pass
        assert mode.done
        assert_unchanged(model, before)
        return mode.callers

    callers = run(InterruptAt(0))
    first = {caller: at for at, caller in reversed(list(enumerate(callers, 1)))}
    last = {caller: at for at, caller in enumerate(callers, 1)}
    files = {Path(file).name for file, _ in first}
    assert files >= {"passes.py", "accumulator.py", "capture.py", "verification.py", "preserve.py"}
    for caller in first:
        for at in {first[caller], last[caller]}:
            assert run(InterruptAt(at, error))[-1] == caller


@pytest.mark.parametrize("name", ["bert-lora", "gpt2-lora", "llama-tied", "t5"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_real_models_after_success(name):
    problem = PROBLEMS[name]
    model, batch = problem.model().train(), problem.batch()
    before = state(model)
    estimate_fisher(model, [batch], progress=False)
    assert_unchanged(model, before)


def test_rotary_tables_that_grow_with_the_longest_sequence():
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    short = torch.randint(2, 50, (2, 80))  # longer than the model's 64 positions
    with torch.no_grad():
        expected = model(input_ids=short).logits
    fresh = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    fresh.load_state_dict(model.state_dict())
    long = torch.randint(2, 50, (2, 100))
    estimate_fisher(fresh, [{"input_ids": long, "labels": long}], params="*q_proj*", progress=False)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=short).logits, expected)


def test_the_callers_hooks_on_parameters_neither_run_nor_go():
    model = nn.Sequential(nn.Linear(I, I), nn.Tanh(), nn.LayerNorm(I), nn.Linear(I, I))
    batch = batches(1)[0]
    expected = estimate_fisher(model, [batch], loss_fn=squared_error, progress=False)
    ran = []

    def step(param):  # an optimizer that steps inside the backward pass
        ran.append("steps")
        param.data.zero_()

    for param in model.parameters():
        param.register_hook(lambda grad: ran.append("scales") or 2 * grad)
        param.register_post_accumulate_grad_hook(step)
    scores = estimate_fisher(model, [batch], loss_fn=squared_error, progress=False)
    assert not ran
    assert scores == expected
    squared_error(model, batch).sum().backward()
    assert ran.count("scales") == ran.count("steps") == 6


def test_gradient_checkpointing_stays_as_it_was():
    class Checkpointed(nn.Module):
        gradient_checkpointing = True

        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(I, I), nn.Dropout(0.5))

        def forward(self, x):
            return checkpoint(self.inner, F.dropout(x, 0.5, self.training), use_reentrant=False)

    model, data = nn.Sequential(nn.Linear(I, I), Checkpointed()).train(), batches()
    before = state(model)
    estimate_fisher(model, data, loss_fn=squared_error, progress=False)
    assert_unchanged(model, before)


def test_scores_keep_no_graph():
    model = made()
    scores = estimate_fisher(model, batches(), loss_fn=squared_error, progress=False)
    assert not any(s.requires_grad or s.grad_fn for s in scores.values())


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("held", [False, True])
def test_what_is_no_candidate_keeps_its_gradient(held, checkpointing):
    """An input that requires one, a parameter of loss_fn's own; also where samples run alone."""
    outside, x = nn.Parameter(torch.randn(2)), torch.randn(4, 3, requires_grad=True)
    model = nn.ModuleDict({"fused": nn.Linear(3, 3), "loop": nn.Bilinear(3, 3, 2)})
    before = [torch.ones_like(tensor) if held else None for tensor in (outside, x)]
    outside.grad, x.grad = (None if grad is None else grad.clone() for grad in before)

    def loss_fn(model, batch):
        def layers(x):
            y = model["fused"](x)
            return model["loop"](y, y)

        if checkpointing is None:
            y = layers(batch[0])
        else:
            y = checkpoint(layers, batch[0], use_reentrant=checkpointing)
        return (y * outside).square().sum(1)

    batch = (x, torch.zeros(4))
    scores = estimate_fisher(model, [batch], loss_fn=loss_fn, progress=False)
    assert all(score.count_nonzero() for score in scores.values())
    for tensor, grad in zip((outside, x), before, strict=True):
        assert (tensor.grad is None) if grad is None else torch.equal(tensor.grad, grad)


DROPOUTS = {
    2: [F.dropout, F.alpha_dropout, torch.dropout, torch.alpha_dropout],
    3: [F.dropout1d, F.feature_alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout],
    4: [F.dropout2d],
    5: [F.dropout3d],
}


@pytest.mark.parametrize("dims", DROPOUTS)
def test_functional_dropout_of_every_kind_is_the_identity(dims):
    x = torch.randn(64, *range(2, dims + 1))
    for dropout in DROPOUTS[dims]:
        assert not torch.equal(dropout(x, 0.5, True), x)
        with handling(NO_DROPOUT), handling({"add": lambda *_: None}):
            assert dropout(x, 0.5, True) is x
