"""conv_fisher_ on every backend, against one-sample autograd in float64."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fishkern import _dispatch
from fishkern.backends import reference
from fishkern.functional import conv_fisher_, linear_fisher_
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
    poisoned,
)
from tests.support.tolerances import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Case:
    """One convolution; ``size`` and ``kernel`` give the number of spatial dimensions."""

    size: tuple
    kernel: tuple
    channels: int = 1  # of one group
    outputs: int = 1  # of one group
    groups: int = 1
    stride: int | tuple = 1
    padding: int | tuple = 0
    dilation: int | tuple = 1
    samples: int = 3
    calls: tuple = ()

    @property
    def geometry(self):
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def weight(self):
        return (self.outputs * self.groups, self.channels, *self.kernel)

    def convolution(self, x, weight, bias=None):
        return CONVOLUTIONS[len(self.kernel)](x, weight, bias, **self.geometry)


CASES = {
    "1x1": Case((4, 4), (1, 1), 8, 16),
    "one number": Case((1,), (1,), samples=1),
    "3x3": Case((6, 5), (3, 3), 4, 6, padding=1),
    "odd": Case((7, 5), (3, 2), 3, 5, stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "patches": Case((8, 12), (4, 4), 3, 10, stride=4),
    "gaps between patches": Case((9, 11), (2, 3), 2, 3, stride=(4, 5)),
    "padding wider than the input": Case((2, 3), (5, 5), 2, 3, padding=4),
    "dilated past the input": Case((4, 4), (3, 3), 2, 2, padding=5, dilation=5),
    "groups": Case((5, 6), (3, 3), 2, 3, groups=3, padding=1),
    "depthwise": Case((6, 6), (3, 3), groups=7, padding=1),
    "depthwise, multiplied": Case((6,), (3,), outputs=2, groups=5, stride=2),
    "depthwise, strided": Case((9, 8), (3, 4), groups=3, stride=(2, 3), padding=2, dilation=(2, 1)),
    "depthwise, 3-D": Case((4, 3, 5), (2, 3, 2), groups=4, stride=(1, 2, 3), padding=(1, 0, 2)),
    "depthwise calls": Case((7,), (3,), outputs=2, groups=3, padding=1, calls=(2,)),
    "1-D": Case((17,), (5,), 3, 7, stride=2, padding=2),
    "1-D, long kernel": Case((30,), (11,), 4, 4, groups=2, padding=5),
    "3-D": Case((3, 4, 5), (2, 3, 3), 2, 4, stride=(1, 2, 1), padding=(1, 0, 1)),
    "calls": Case((5, 4), (3, 3), 2, 3, padding=1, calls=(2,)),
    "calls of groups": Case((9,), (3,), 2, 2, groups=2, stride=2, calls=(3,)),
    "no samples": Case((4, 4), (2, 2), samples=0),
}
# More than a block of the compiled kernels in every direction, and more positions than a chunk.
LARGE_CASES = {
    "many features": Case((5, 4), (3, 3), 50, 131, padding=1, samples=2),
    "many positions": Case((17, 19), (3, 3), 3, 9, padding=1, samples=2),
    "few features": Case((17, 19), (1, 1), 4, 300, samples=2),
    "many groups": Case((12, 12), (3, 3), 2, 2, groups=20, padding=1, samples=2),
    "depthwise": Case((25, 22), (7, 7), groups=40, padding=3, stride=(1, 2), samples=2),
}


def problem(case, dtype=torch.float32, grad_dtype=None):
    channels = case.channels * case.groups
    x = torch.randn(case.samples, *case.calls, channels, *case.size).to(dtype)
    reached = case.convolution(torch.empty(1, channels, *case.size), torch.empty(case.weight))
    grad_out = torch.randn(case.samples, *case.calls, *reached.shape[1:])
    return x, grad_out.to(grad_dtype or dtype)


def truth(case, x, grad_out, mask=None):
    """fisher, bias_fisher and sample_scores, a sample at a time."""
    fisher = torch.zeros(case.weight, dtype=torch.float64)
    bias_fisher = torch.zeros(case.weight[0], dtype=torch.float64)
    scores = torch.zeros(len(x), dtype=torch.float64)
    for n in range(len(x)):
        weight = torch.zeros_like(fisher, requires_grad=True)
        bias = torch.zeros_like(bias_fisher, requires_grad=True)
        sample = x[n].double().reshape(-1, *x.shape[-len(case.size) - 1 :])
        y = case.convolution(sample, weight, bias)
        y.backward(grad_out[n].double().reshape(y.shape))
        square = weight.grad.square()
        fisher += square
        bias_fisher += bias.grad.square()
        scores[n] = square.sum() if mask is None else square[mask].sum()
    return fisher, bias_fisher, scores


def check(case, x, grad_out, mask=None):
    """All three outputs, each added to what is there; and the weights' alone."""
    expected = truth(case, x, grad_out, mask)
    outputs = [torch.full_like(e, 0.5, dtype=torch.float32) for e in expected]
    conv_fisher_(
        outputs[0],
        x,
        grad_out,
        bias_fisher=outputs[1],
        sample_scores=outputs[2],
        mask=mask,
        **case.geometry,
    )
    terms = max(grad_out.numel() * math.prod(case.kernel), 1)
    for actual, e in zip(outputs, expected, strict=True):
        assert_matches(actual, e + 0.5, terms=terms)
    fisher = torch.zeros(case.weight)
    conv_fisher_(fisher, x, grad_out, **case.geometry)
    assert_matches(fisher, expected[0], terms=terms)


def check_many_cases():
    """Every case in every dtype: what each instruction set is put through."""
    cases = [*CASES.values(), *LARGE_CASES.values()]
    for case, dtype in itertools.product(cases, DTYPES):
        x, grad_out = problem(case, dtype)
        check(case, x, grad_out, torch.rand(case.weight) < 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_conv_fisher_equals_one_sample_autograd(backend, name, dtype):
    case = CASES[name]
    x, grad_out = problem(case, dtype)
    check(case, x, grad_out)
    check(case, x, grad_out, torch.rand(case.weight) < 0.5)


@pytest.mark.parametrize("name", LARGE_CASES)
def test_conv_fisher_of_many_blocks(native, name):
    case = LARGE_CASES[name]
    x, grad_out = problem(case)
    check(case, x, grad_out, torch.rand(case.weight) < 0.5)


def any_case(seed):
    draw = random.Random(seed)
    dims = draw.randint(1, 3)

    def each(low, high):
        return tuple(draw.randint(low, high) for _ in range(dims))

    kernel, padding, dilation = each(1, 3), each(0, 2), each(1, 3)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    return Case(
        tuple(low + draw.randint(0, 4) for low in least),
        kernel,
        *(draw.randint(1, 4) for _ in range(3)),
        stride=each(1, 3),
        padding=padding,
        dilation=dilation,
        samples=draw.randint(1, 3),
        calls=draw.choice([(), (1,), (2,)]),
    )


@pytest.mark.parametrize("seed", range(100))
def test_conv_fisher_of_any_convolution(seed):
    case = any_case(seed)
    torch.manual_seed(0)
    x, grad_out = problem(case)
    mask = torch.rand(case.weight) < 0.5
    for name in ("native", "reference"):
        if _dispatch.why_not(name) is None:
            with _dispatch.use_backend(name):
                check(case, x, grad_out, mask)


def test_conv_fisher_reference_in_float64():
    case = CASES["odd"]
    x, grad_out = problem(case, torch.float64)
    expected = truth(case, x, grad_out)
    actual = [torch.zeros_like(e) for e in expected]
    geometry = {
        k: [v] * 2 if isinstance(v, int) and k != "groups" else v for k, v in case.geometry.items()
    }
    reference.conv_fisher_(
        actual[0], x, grad_out, bias_fisher=actual[1], sample_scores=actual[2], **geometry
    )
    for a, e in zip(actual, expected, strict=True):
        assert_matches(a, e, torch.float64, terms=100)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_conv_fisher_of_two_dtypes(backend, dtypes):
    check(CASES["odd"], *problem(CASES["odd"], *dtypes))


def test_conv_fisher_of_float64_inputs(backend):
    x, grad_out = problem(CASES["odd"], torch.float64)
    if backend == "triton":
        with pytest.raises(TypeError, match="float64"):
            conv_fisher_(torch.zeros(CASES["odd"].weight), x, grad_out, **CASES["odd"].geometry)
    else:
        check(CASES["odd"], x, grad_out)


def test_conv_fisher_of_a_kernel_of_one_is_linear_fisher(backend):
    x, grad_out = torch.randn(3, 7, 5, 4), torch.randn(3, 6, 5, 4)
    fisher, expected = torch.zeros(6, 7, 1, 1), torch.zeros(6, 7)
    conv_fisher_(fisher, x, grad_out)
    linear_fisher_(expected, x.flatten(2).mT, grad_out.flatten(2).mT)
    assert_matches(fisher[:, :, 0, 0], expected.double(), terms=60)


# Memory: strides of all kinds, and nothing read or written outside.


INSIDE = ["odd", "groups", "padding wider than the input", "calls", "3-D", "depthwise, strided"]


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("step", [1, 2])
def test_conv_fisher_stays_inside_its_tensors(backend, name, step):
    case = CASES[name]
    x, grad_out = problem(case)
    expected = truth(case, x, grad_out)
    outputs = [poisoned(torch.ones(e.shape), step=step) for e in expected]
    conv_fisher_(
        outputs[0],
        poisoned(x, step=step),
        poisoned(grad_out, step=step),
        bias_fisher=outputs[1],
        sample_scores=outputs[2],
        **case.geometry,
    )
    for view, e in zip(outputs, expected, strict=True):
        assert_matches(view.clone(), e + 1, terms=e.numel() * 100)
        assert view._base.isfinite().sum() == e.numel()


@pytest.mark.parametrize("layout", ["channels last", "expanded", "transposed"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_conv_fisher_of_other_layouts(backend, layout, depthwise):
    sizes = {"groups": 5} if depthwise else {"channels": 4, "outputs": 5}
    case = Case((6, 6), (3, 3), **sizes, padding=1, stride=2)
    x, grad_out = problem(case)
    mask = torch.rand(case.weight) < 0.5
    if layout == "channels last":
        x, grad_out = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_out))
        mask = mask.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":  # as the gradient of a mean is
        grad_out = torch.randn(case.samples, case.weight[0], 1, 1).expand_as(grad_out)
    else:
        x, grad_out = x.mT.contiguous().mT, grad_out.mT.contiguous().mT
    check(case, x, grad_out, mask)
    fisher = torch.ones(case.weight).contiguous(memory_format=torch.channels_last)
    conv_fisher_(fisher, x, grad_out, **case.geometry)
    assert_matches(fisher, truth(case, x, grad_out)[0] + 1, terms=100)


# The definition.


def test_conv_fisher_squares_between_positions_and_samples(backend):
    x, grad = torch.ones(2, 1, 4), torch.tensor([[[1.0, 1.0, -1.0]], [[-1.0, 1.0, -1.0]]])
    fisher, bias_fisher = torch.zeros(1, 1, 2), torch.zeros(1)
    conv_fisher_(fisher, x, grad, bias_fisher=bias_fisher)
    assert torch.equal(fisher, torch.full((1, 1, 2), 2.0))
    assert bias_fisher.item() == 2.0


def test_conv_fisher_squares_after_the_sum_over_calls(backend):
    x, grad = torch.ones(3, 2, 1, 5), torch.ones(3, 1, 2, 4)
    fisher, bias_fisher = torch.zeros(2, 1, 2), torch.zeros(2)
    conv_fisher_(fisher, x, torch.cat([grad, -grad], 1), bias_fisher=bias_fisher)
    assert not fisher.any()
    assert not bias_fisher.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_fisher_of_integers_is_exact(backend, dtype):
    case = Case((5, 4), (3, 3), 5, 6, padding=1, groups=2)
    x, grad_out = problem(case)
    x, grad_out = ((2 * t).round().to(dtype) for t in (x, grad_out))
    expected = truth(case, x, grad_out)
    outputs = [torch.ones(e.shape) for e in expected]
    conv_fisher_(
        outputs[0],
        x,
        grad_out,
        bias_fisher=outputs[1],
        sample_scores=outputs[2],
        **case.geometry,
    )
    for actual, e in zip(outputs, expected, strict=True):
        assert torch.equal(actual.double(), e + 1)


def run_all_outputs(case, x, grad_out, mask):
    outputs = torch.ones(case.weight), torch.ones(case.weight[0]), torch.ones(len(x))
    conv_fisher_(
        outputs[0],
        x,
        grad_out,
        bias_fisher=outputs[1],
        sample_scores=outputs[2],
        mask=mask,
        **case.geometry,
    )
    return outputs


def test_conv_fisher_is_deterministic(backend):
    case = Case((6, 5), (3, 3), 9, 20, groups=2, padding=1, samples=5)
    arguments = (case, *problem(case), torch.rand(case.weight) < 0.5)
    first, second = (run_all_outputs(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", LARGE_CASES)
def test_conv_fisher_does_not_depend_on_threads(native, name):
    case = LARGE_CASES[name]
    arguments = (case, *problem(case), torch.rand(case.weight) < 0.5)
    assert_same_with_any_threads(lambda: run_all_outputs(*arguments))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_conv_fisher_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_many_cases, isa)


# What is refused.


ERRORS = {
    "fisher is a matrix": (ValueError, "one to three spatial", {"fisher": (2, 4)}),
    "fisher has four spatial dimensions": (ValueError, "one to three", {"fisher": (2,) * 6}),
    "stride is zero": (ValueError, "stride is 0", {"stride": 0}),
    "stride has three numbers": (ValueError, "stride is", {"stride": (1, 1, 1)}),
    "padding is negative": (ValueError, "padding is -1", {"padding": -1}),
    "padding is a word": (ValueError, "padding is 'same'", {"padding": "same"}),
    "dilation is a float": (ValueError, "dilation is", {"dilation": (1.0, 1)}),
    "groups do not divide": (ValueError, "groups is 3", {"groups": 3}),
    "groups of other channels": (ValueError, "x has 4 channels", {"groups": 2}),
    "x has no samples": (ValueError, "same leading dimensions", {"x": (4, 5, 6)}),
    "samples differ": (ValueError, "same leading dimensions", {"x": (4, 4, 5, 6)}),
    "calls differ": (ValueError, "same leading dimensions", {"x": (3, 2, 4, 5, 6)}),
    "channels differ": (ValueError, "x has 5 channels", {"x": (3, 5, 5, 6)}),
    "outputs differ": (ValueError, "grad_out 3", {"grad_out": (3, 3, 4, 4)}),
    "positions differ": (ValueError, r"has positions \[4, 5\]", {"grad_out": (3, 2, 4, 5)}),
    "fisher is bfloat16": (TypeError, "fisher has dtype", {"fisher": torch.bfloat16}),
    "x is integer": (TypeError, "x has dtype", {"x": torch.int64}),
    "grad_out is integer": (TypeError, "grad_out has dtype", {"grad_out": torch.int32}),
    "bias has a wrong shape": (ValueError, "bias_fisher has shape", {"bias_fisher": (3,)}),
    "scores have a wrong shape": (ValueError, "sample_scores has", {"sample_scores": (5,)}),
    "mask without scores": (ValueError, "pass both or neither", {"sample_scores": None}),
    "mask is float": (TypeError, "mask has dtype", {"mask": torch.float32}),
    "mask is flat": (ValueError, "mask has shape", {"mask": (2, 24)}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_conv_fisher_refuses(case):
    error, message, changes = ERRORS[case]
    arguments = {
        "fisher": torch.zeros(2, 4, 2, 3),
        "x": torch.ones(3, 4, 5, 6),
        "grad_out": torch.ones(3, 2, 4, 4),
        "bias_fisher": torch.zeros(2),
        "sample_scores": torch.zeros(3),
        "mask": torch.ones(2, 4, 2, 3, dtype=torch.bool),
    }
    for name, change in changes.items():
        if name in arguments and isinstance(change, tuple):
            arguments[name] = torch.ones(change, dtype=arguments[name].dtype)
        elif isinstance(change, torch.dtype):
            arguments[name] = arguments[name].to(change)
        else:
            arguments[name] = change
    before = {name: t.clone() for name, t in arguments.items() if torch.is_tensor(t)}
    with pytest.raises(error, match=message):
        conv_fisher_(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor)
