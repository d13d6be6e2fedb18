"""norm_fisher_ on every backend, against per-sample gradients in float64."""

import itertools
import math

import pytest
import torch

from fishkern import _dispatch
from fishkern.functional import norm_fisher_
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
    poisoned,
)
from tests.support.tolerances import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WANTED = [(True, True), (True, False), (False, True)]  # weight, bias

# N, token dimensions, C: round, odd, few and many tokens, none, several token dimensions, more
# samples than the compiled kernel has groups.
SHAPES = [
    (2, (8,), 16),
    (3, (5,), 7),
    (5, (), 13),
    (2, (2, 3), 10),
    (2, (70,), 33),
    (1, (1,), 1),
    (40, (2,), 3),
    (3, (5,), 260),
]


def problem(shape, dtype=torch.float32, grad_dtype=None):
    num_samples, tokens, size = shape
    x_hat = torch.randn(num_samples, *tokens, size).to(dtype)
    return x_hat, torch.randn(num_samples, *tokens, size).to(grad_dtype or dtype)


def truth(x_hat, grad_out, wanted=(True, True), masks=(None, None)):
    """weight_fisher, bias_fisher and sample_scores, by one backward pass a sample in float64."""
    size = grad_out.shape[-1]
    weight = torch.ones(size, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    totals = [torch.zeros(size, dtype=torch.float64) for _ in wanted]
    scores = torch.zeros(len(grad_out), dtype=torch.float64)
    for n in range(len(grad_out)):
        y = x_hat[n].double() * weight + bias
        grads = torch.autograd.grad(y, (weight, bias), grad_out[n].double())
        for total, grad, mask, used in zip(totals, grads, masks, wanted, strict=True):
            if used:
                total += grad.square()
                scores[n] += (grad if mask is None else grad[mask]).square().sum()
    return *totals, scores


def check(x_hat, grad_out, wanted=(True, True), masks=(None, None)):
    """All outputs, each added to what is there, and the accumulators without scores."""
    expected = truth(x_hat, grad_out, wanted, masks)
    terms = max(len(grad_out) * math.prod(grad_out.shape[1:-1]), 1)
    for scored in (True, False):
        outputs = [torch.full_like(e, 0.5, dtype=torch.float32) for e in expected]
        norm_fisher_(
            outputs[0] if wanted[0] else None,
            outputs[1] if wanted[1] else None,
            x_hat if wanted[0] else None,
            grad_out,
            sample_scores=outputs[2] if scored else None,
            weight_mask=masks[0] if scored and wanted[0] else None,
            bias_mask=masks[1] if scored and wanted[1] else None,
        )
        for actual, e in zip(outputs[:2], expected[:2], strict=True):
            assert_matches(actual, e + 0.5, terms=terms)
        if scored:
            assert_matches(outputs[2], expected[2] + 0.5, terms=max(grad_out.numel(), 1))


def masks_for(size):
    return torch.rand(size) < 0.5, torch.rand(size) < 0.5


def check_many_shapes():
    """Every shape in every dtype: what each instruction set is put through."""
    for shape, dtype, wanted in itertools.product(SHAPES, DTYPES, WANTED):
        check(*problem(shape, dtype), wanted, masks_for(shape[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_fisher_equals_per_sample_autograd(backend, shape, dtype):
    x_hat, grad_out = problem(shape, dtype)
    for wanted in WANTED:
        check(x_hat, grad_out, wanted)
        check(x_hat, grad_out, wanted, masks_for(shape[2]))


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_norm_fisher_of_two_dtypes(backend, dtypes):
    check(*problem((3, (4,), 6), *dtypes))


@pytest.mark.parametrize("other", [*DTYPES, torch.float64], ids=str)
def test_norm_fisher_of_float64_inputs(backend, other):
    for dtypes in ((torch.float64, other), (other, torch.float64)):
        x_hat, grad_out = problem((3, (4,), 6), *dtypes)
        if backend == "triton":
            with pytest.raises(TypeError, match="float64"):
                norm_fisher_(torch.zeros(6), None, x_hat, grad_out)
        else:
            check(x_hat, grad_out)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("which", ["N", "T", "C"])
def test_norm_fisher_of_degenerate_sizes(backend, which, size):
    n, t, c = (size if letter == which else 4 for letter in "NTC")
    for wanted in WANTED:
        check(*problem((n, (t,), c)), wanted, masks_for(c))
        check(*problem((n, (t, 2), c)), wanted)


def layouts():
    yield "features first", torch.randn(6, 5, 3).permute(2, 1, 0)
    yield "tokens first", torch.randn(5, 3, 6).transpose(0, 1)
    yield "every second feature", torch.randn(3, 5, 12)[..., ::2]
    yield "every second token", torch.randn(3, 10, 6)[:, ::2]
    yield "one sample for all", torch.randn(1, 5, 6).expand(3, 5, 6)
    yield "one token for all", torch.randn(3, 1, 6).expand(3, 5, 6)
    yield "one feature for all", torch.randn(3, 5, 1).expand(3, 5, 6)
    yield "one number for all", torch.randn(()).expand(3, 5, 6)


@pytest.mark.parametrize("name", [name for name, _ in layouts()])
def test_norm_fisher_of_strided_inputs(backend, name):
    x_hat = dict(layouts())[name]
    check(x_hat, torch.randn(3, 5, 6))
    check(torch.randn(3, 5, 6), x_hat)
    check(x_hat.to(torch.bfloat16), x_hat)
    check(x_hat[:, :1], x_hat[:, :1])


def test_norm_fisher_of_token_dimensions_that_cannot_be_joined(backend):
    check(torch.randn(3, 4, 2, 6).transpose(1, 2), torch.randn(3, 2, 4, 6))


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_norm_fisher_touches_nothing_outside_the_views(backend, shape):
    x_hat, grad_out = problem(shape)
    expected = truth(x_hat, grad_out)
    views = [poisoned(torch.ones(e.shape)) for e in expected]
    norm_fisher_(*views[:2], poisoned(x_hat), poisoned(grad_out), sample_scores=views[2])
    for view, e in zip(views, expected, strict=True):
        assert_matches(view.clone(), e + 1, terms=grad_out.numel())
        assert view._base.isfinite().sum() == e.numel()


def test_norm_fisher_of_strided_accumulators_and_masks(backend):
    x_hat, grad_out = problem((3, (4,), 6))
    masks = (torch.rand(12) < 0.5)[::2], (torch.rand(8) < 0.5)[1:7]
    expected = truth(x_hat, grad_out, masks=masks)
    outputs = [torch.zeros(2 * len(e))[::2] for e in expected]
    norm_fisher_(
        *outputs[:2],
        x_hat,
        grad_out,
        sample_scores=outputs[2],
        weight_mask=masks[0],
        bias_mask=masks[1],
    )
    for actual, e in zip(outputs, expected, strict=True):
        assert_matches(actual, e, terms=grad_out.numel())


def test_norm_fisher_squares_before_the_sum_over_samples(backend):
    x_hat, grad = torch.ones(2, 3, 4), torch.ones(1, 3, 4)
    outputs = torch.zeros(4), torch.zeros(4)
    norm_fisher_(*outputs, x_hat, torch.cat([grad, -grad]))
    assert all(torch.equal(output, torch.full((4,), 18.0)) for output in outputs)


def test_norm_fisher_squares_after_the_sum_over_tokens(backend):
    x_hat, grad = torch.ones(3, 2, 4), torch.ones(3, 1, 4)
    outputs = torch.zeros(4), torch.zeros(4), torch.zeros(3)
    norm_fisher_(*outputs[:2], x_hat, torch.cat([grad, -grad], 1), sample_scores=outputs[2])
    assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(6,), (1,), ()], ids=str)
def test_norm_fisher_of_integers_is_exact(backend, dtype, tokens):
    x_hat, grad_out = (torch.randint(-3, 4, (4, *tokens, 21)).to(dtype) for _ in range(2))
    masks = masks_for(21)
    outputs = torch.ones(21), torch.ones(21), torch.ones(4)
    norm_fisher_(
        *outputs[:2],
        x_hat,
        grad_out,
        sample_scores=outputs[2],
        weight_mask=masks[0],
        bias_mask=masks[1],
    )
    for actual, expected in zip(outputs, truth(x_hat, grad_out, masks=masks), strict=True):
        assert torch.equal(actual.double(), expected + 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_fisher_keeps_special_values_where_they_belong(backend, dtype, bad):
    x_hat, grad_out = problem((3, (4,), 6), dtype)
    x_hat[1, 2, 3] = bad
    outputs = torch.zeros(6), torch.zeros(6), torch.zeros(3)
    norm_fisher_(*outputs[:2], x_hat, grad_out, sample_scores=outputs[2])
    assert (~outputs[0].isfinite()).nonzero()[:, 0].tolist() == [3]
    assert outputs[1].isfinite().all()
    assert outputs[2].isfinite().tolist() == [True, False, True]
    mask = torch.arange(6) != 3
    inside = torch.zeros(3)
    norm_fisher_(torch.zeros(6), None, x_hat, grad_out, sample_scores=inside, weight_mask=mask)
    expected = truth(x_hat, grad_out, (True, False), (mask, None))[2]
    assert_matches(inside, expected, terms=24)


def run(x_hat, grad_out, masks):
    size = grad_out.shape[-1]
    outputs = torch.ones(size), torch.ones(size), torch.ones(len(grad_out))
    norm_fisher_(
        *outputs[:2],
        x_hat,
        grad_out,
        sample_scores=outputs[2],
        weight_mask=masks[0],
        bias_mask=masks[1],
    )
    return outputs


def test_norm_fisher_is_deterministic(backend):
    x_hat, grad_out = problem((5, (9,), 140))
    masks = masks_for(140)
    first, second = (run(x_hat, grad_out, masks) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [(8, (64,), 400), (100, (16,), 130), (3, (500,), 33)])
def test_norm_fisher_does_not_depend_on_threads(native, shape):
    x_hat, grad_out = problem(shape)
    masks = masks_for(shape[2])
    assert_same_with_any_threads(lambda: run(x_hat, grad_out, masks))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_norm_fisher_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_many_shapes, isa)


def test_norm_fisher_into_float64_is_the_references(native):
    x_hat, grad_out = problem((3, (4,), 6), torch.float64)
    outputs = torch.zeros(6).double(), torch.zeros(6).double()
    with pytest.raises(RuntimeError, match="float64"):
        norm_fisher_(*outputs, x_hat, grad_out)
    with _dispatch.use_backend("reference"):
        norm_fisher_(*outputs, x_hat, grad_out)
    for actual, expected in zip(outputs, truth(x_hat, grad_out)[:2], strict=True):
        assert_matches(actual, expected, torch.float64)


ERRORS = {
    "nothing to compute": (
        ValueError,
        "are None",
        {"weight_fisher": None, "bias_fisher": None, "weight_mask": None, "bias_mask": None},
    ),
    "grad_out is 1-D": (ValueError, "grad_out has shape", {"grad_out": (3,)}),
    "no x_hat": (ValueError, "x_hat is None", {"x_hat": None}),
    "shapes differ": (ValueError, "x_hat has shape", {"x_hat": (4, 6, 3)}),
    "x_hat is integer": (TypeError, "x_hat has dtype", {"x_hat": torch.int64}),
    "grad_out is integer": (TypeError, "grad_out has dtype", {"grad_out": torch.int32}),
    "weight is 2-D": (ValueError, "weight_fisher has shape", {"weight_fisher": (3, 1)}),
    "weight is bfloat16": (TypeError, "weight_fisher has", {"weight_fisher": torch.bfloat16}),
    "bias has a wrong shape": (ValueError, "bias_fisher has shape", {"bias_fisher": (4,)}),
    "bias is float16": (TypeError, "bias_fisher has dtype", {"bias_fisher": torch.float16}),
    "scores have a wrong shape": (ValueError, "sample_scores has", {"sample_scores": (5,)}),
    "mask without scores": (ValueError, "pass both or neither", {"sample_scores": None}),
    "mask without weight": (ValueError, "weight_mask is given", {"weight_fisher": None}),
    "mask without bias": (ValueError, "bias_mask is given", {"bias_fisher": None}),
    "mask is float": (TypeError, "weight_mask has dtype", {"weight_mask": torch.float32}),
    "mask has a wrong shape": (ValueError, "bias_mask has shape", {"bias_mask": (4,)}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_norm_fisher_refuses(case):
    error, message, changes = ERRORS[case]
    arguments = {
        "weight_fisher": torch.zeros(3),
        "bias_fisher": torch.zeros(3),
        "x_hat": torch.ones(4, 5, 3),
        "grad_out": torch.ones(4, 5, 3),
        "sample_scores": torch.zeros(4),
        "weight_mask": torch.ones(3, dtype=torch.bool),
        "bias_mask": torch.ones(3, dtype=torch.bool),
    }
    for name, change in changes.items():
        if isinstance(change, tuple):
            arguments[name] = torch.ones(change, dtype=arguments[name].dtype)
        elif isinstance(change, torch.dtype):
            arguments[name] = arguments[name].to(change)
        else:
            arguments[name] = change
    before = {name: t.clone() for name, t in arguments.items() if t is not None}
    with pytest.raises(error, match=message):
        norm_fisher_(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor)
