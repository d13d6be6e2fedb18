"""linear_fisher_ on every backend, against per-sample gradients in float64."""

import itertools
import math

import pytest
import torch

from fishkern.functional import linear_fisher_
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
    poisoned,
)
from tests.support.tolerances import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, token dimensions, O, I: round, odd, rank-shaped, without tokens, with several token dimensions.
SHAPES = [
    (2, (8,), 16, 32),
    (3, (5,), 7, 11),
    (2, (17,), 65, 3),
    (2, (9,), 4, 67),
    (5, (), 13, 6),
    (2, (2, 3), 9, 10),
    (1, (1,), 1, 1),
]
# More than a block of the compiled kernels in every direction, and more tokens than a chunk.
LARGE_SHAPES = [
    (3, (7,), 395, 390),
    (2, (300,), 70, 200),
    (150, (), 66, 194),
    (2, (129,), 401, 3),
    (70, (3,), 10, 401),
    (2, (130,), 12, 1600),
]


def problem(shape, dtype=torch.float32, grad_dtype=None):
    num_samples, tokens, num_outputs, num_inputs = shape
    x = torch.randn(num_samples, *tokens, num_inputs).to(dtype)
    return x, torch.randn(num_samples, *tokens, num_outputs).to(grad_dtype or dtype)


def truth(x, grad_out, mask=None):
    """fisher, bias_fisher and sample_scores from every sample's gradient, in float64."""
    tokens = math.prod(x.shape[1:-1])
    x, grad_out = (t.double().reshape(len(t), tokens, t.shape[-1]) for t in (x, grad_out))
    per_sample = torch.einsum("nto,nti->noi", grad_out, x).square()
    scored = (
        per_sample if mask is None else per_sample.where(mask, torch.zeros((), dtype=torch.float64))
    )
    return per_sample.sum(0), grad_out.sum(1).square().sum(0), scored.sum((1, 2))


def check(x, grad_out, mask=None):
    """All three outputs, each added to what is there."""
    expected = truth(x, grad_out, mask)
    outputs = [torch.full_like(e, 0.5, dtype=torch.float32) for e in expected]
    linear_fisher_(
        outputs[0], x, grad_out, bias_fisher=outputs[1], sample_scores=outputs[2], mask=mask
    )
    check_fisher_alone(x, grad_out, expected[0])
    for actual, e, sums in zip(
        outputs, expected, (len(x), len(x), outputs[0].numel()), strict=True
    ):
        tokens = math.prod(x.shape[1:-1])
        assert_matches(actual, e + 0.5, terms=max(sums * tokens, 1))


def check_fisher_alone(x, grad_out, expected):
    fisher = torch.zeros(expected.shape)
    linear_fisher_(fisher, x, grad_out)
    assert_matches(fisher, expected, terms=len(x) * math.prod(x.shape[1:-1]))


def check_without_scores(x, grad_out, op=linear_fisher_):
    expected = truth(x, grad_out)[:2]
    outputs = [torch.full_like(e, 0.5, dtype=torch.float32) for e in expected]
    op(outputs[0], x, grad_out, bias_fisher=outputs[1])
    for actual, e in zip(outputs, expected, strict=True):
        assert_matches(actual, e + 0.5, terms=max(len(x), 1))


def check_many_shapes():
    """Every shape in every dtype: what each instruction set is put through."""
    for shape, dtype in itertools.product(SHAPES + LARGE_SHAPES, DTYPES):
        x, grad_out = problem(shape, dtype)
        check(x, grad_out, torch.rand(shape[2:]) < 0.5)
        check(x, grad_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_fisher_equals_per_sample_autograd(backend, shape):
    x, grad_out = problem(shape)
    layer = torch.nn.Linear(shape[3], shape[2]).double()
    weight, bias = torch.zeros(shape[2:], dtype=torch.float64), torch.zeros(shape[2]).double()
    for sample, grad in zip(x.double(), grad_out.double(), strict=True):
        layer.zero_grad()
        layer(sample).backward(grad)
        weight += layer.weight.grad.square()
        bias += layer.bias.grad.square()
    fisher, bias_fisher = torch.zeros(weight.shape), torch.zeros(bias.shape)
    linear_fisher_(fisher, x, grad_out, bias_fisher=bias_fisher)
    terms = len(x) * math.prod(shape[1])
    assert_matches(fisher, weight, terms=terms)
    assert_matches(bias_fisher, bias, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_fisher_of_dtypes(backend, shape, dtype):
    x, grad_out = problem(shape, dtype)
    check(x, grad_out, torch.rand(shape[2:]) < 0.5)
    check(x, grad_out)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_linear_fisher_of_two_dtypes(backend, dtypes):
    check(*problem((3, (4,), 5, 6), *dtypes))


@pytest.mark.parametrize("other", [*DTYPES, torch.float64], ids=str)
def test_linear_fisher_of_float64_inputs(backend, other):
    for dtypes in ((torch.float64, other), (other, torch.float64)):
        x, grad_out = problem((3, (4,), 5, 6), *dtypes)
        if backend == "triton":
            with pytest.raises(TypeError, match="float64"):
                linear_fisher_(torch.zeros(5, 6), x, grad_out)
        else:
            check(x, grad_out)


SINGLE_TOKENS = [
    *[(5, (), 13, 6), (150, (1,), 66, 194), (3, (1, 1), 401, 3)],
    *[(0, (), 4, 3), (0, (1,), 4, 3), (3, (1,), 0, 4), (3, (1,), 4, 0), (1, (), 1, 1)],
]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("shape", SINGLE_TOKENS, ids=str)
def test_linear_fisher_of_single_tokens_is_of_float32_in_all_precisions(backend, shape, precision):
    x, grad_out = problem(shape)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check_without_scores(x, grad_out)
        check_without_scores(x.to(torch.bfloat16), grad_out.to(torch.float16))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SINGLE_TOKENS, ids=str)
def test_linear_fisher_of_single_tokens_without_the_matrix_product(native, shape, dtype):
    op = torch.ops.fishkern_native.linear_fisher_
    check_without_scores(*problem(shape, dtype), op)


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_linear_fisher_of_large_shapes(native, shape):
    x, grad_out = problem(shape)
    check(x, grad_out, torch.rand(shape[2:]) < 0.5)
    check(x, grad_out)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("which", ["N", "T", "O", "I"])
def test_linear_fisher_of_degenerate_sizes(backend, which, size):
    n, t, o, i = (size if letter == which else 4 for letter in "NTOI")
    check(*problem((n, (t,), o, i)))
    check(*problem((n, (t,), o, i)), mask=torch.ones(o, i, dtype=torch.bool))
    check(*problem((n, (t, 2), o, i)))


def layouts():
    base = torch.randn
    yield "features first", base(6, 5, 3).permute(2, 1, 0)
    yield "tokens first", base(5, 3, 6).transpose(0, 1)
    yield "every second feature", base(3, 5, 12)[..., ::2]
    yield "every second token", base(3, 10, 6)[:, ::2]
    yield "one sample for all", base(1, 5, 6).expand(3, 5, 6)
    yield "one token for all", base(3, 1, 6).expand(3, 5, 6)
    yield "one feature for all", base(3, 5, 1).expand(3, 5, 6)
    yield "one number for all", base(()).expand(3, 5, 6)


@pytest.mark.parametrize("name", [name for name, _ in layouts()])
def test_linear_fisher_of_strided_inputs(backend, name):
    x = dict(layouts())[name]
    check(x, torch.randn(3, 5, 4))
    check(torch.randn(3, 5, 4), x)
    check(x.to(torch.bfloat16), x)
    check(x[:, :1], x[:, :1])


def test_linear_fisher_of_token_dimensions_that_cannot_be_joined(backend):
    check(torch.randn(3, 4, 2, 6).transpose(1, 2), torch.randn(3, 2, 4, 5))


@pytest.mark.parametrize("shape", [*SHAPES[:4], LARGE_SHAPES[0]], ids=str)
def test_linear_fisher_reads_nothing_outside_the_views(backend, shape):
    if backend == "triton" and shape in LARGE_SHAPES:
        pytest.skip("too slow in the interpreter")
    x, grad_out = (poisoned(t) for t in problem(shape))
    check(x, grad_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_fisher_writes_nothing_outside_the_views(backend, shape):
    x, grad_out = problem(shape)
    expected = truth(x, grad_out)
    for transposed in (False, True):
        views = [poisoned(torch.ones(e.shape[::-1] if transposed else e.shape)) for e in expected]
        fisher, bias_fisher, sample_scores = views
        fisher = fisher.T if transposed else fisher
        linear_fisher_(fisher, x, grad_out, bias_fisher=bias_fisher, sample_scores=sample_scores)
        for view, e in zip((fisher, bias_fisher, sample_scores), expected, strict=True):
            assert_matches(view.clone(), e + 1, terms=e.numel() * x.numel())
            assert view._base.isfinite().sum() == e.numel()


@pytest.mark.parametrize("strided", ["transposed", "every second", "slice"])
def test_linear_fisher_of_strided_masks(backend, strided):
    x, grad_out = problem((3, (4,), 5, 6))
    mask = {
        "transposed": (torch.rand(6, 5) < 0.5).T,
        "every second": (torch.rand(5, 12) < 0.5)[:, ::2],
        "slice": (torch.rand(9, 9) < 0.5)[2:7, 2:8],
    }[strided]
    check(x, grad_out, mask)


def test_linear_fisher_squares_before_the_sum_over_samples(backend):
    x, grad = torch.ones(1, 3, 4).expand(2, 3, 4), torch.ones(1, 3, 5)
    fisher = torch.zeros(5, 4)
    linear_fisher_(fisher, x, torch.cat([grad, -grad]))
    assert torch.equal(fisher, torch.full((5, 4), 18.0))


def test_linear_fisher_squares_after_the_sum_over_tokens(backend):
    x, grad = torch.ones(3, 2, 4), torch.ones(3, 1, 5)
    outputs = torch.zeros(5, 4), torch.zeros(5), torch.zeros(3)
    linear_fisher_(
        outputs[0], x, torch.cat([grad, -grad], 1), bias_fisher=outputs[1], sample_scores=outputs[2]
    )
    assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(6,), (1,), ()], ids=str)
def test_linear_fisher_of_integers_is_exact(backend, dtype, tokens):
    x = torch.randint(-3, 4, (4, *tokens, 21)).to(dtype)
    grad_out = torch.randint(-3, 4, (4, *tokens, 18)).to(dtype)
    mask = torch.rand(18, 21) < 0.5
    outputs = torch.ones(18, 21), torch.ones(18), torch.ones(4)
    linear_fisher_(
        outputs[0], x, grad_out, bias_fisher=outputs[1], sample_scores=outputs[2], mask=mask
    )
    for actual, expected in zip(outputs, truth(x, grad_out, mask), strict=True):
        assert torch.equal(actual.double(), expected + 1)


def test_linear_fisher_of_halves_covers_their_whole_range(backend):
    extremes = torch.tensor([2.0**-24, -(2.0**-15), 2.0**-14, 1.0, -65504.0, 0.0, -0.0])
    for dtype in (torch.float16, torch.bfloat16):
        x = extremes.to(dtype).repeat(9).view(1, 1, -1).repeat(1, 2, 1)
        grad_out = torch.tensor([[[1.0], [0.0]]])
        fisher = torch.zeros(1, x.shape[-1])
        linear_fisher_(fisher, x, grad_out)
        assert torch.equal(fisher.double(), x[0, :1].double().square())


# numpy, which stands in for the hardware in the interpreter, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_fisher_keeps_special_values_where_they_belong(backend, dtype, bad):
    x, grad_out = problem((3, (4,), 5, 60), dtype)
    x[1, 2, 3] = bad
    mask = torch.ones(5, 60, dtype=torch.bool)
    mask[:, 3] = False
    fisher, inside, everywhere = torch.zeros(5, 60), torch.zeros(3), torch.zeros(3)
    linear_fisher_(fisher, x, grad_out, sample_scores=inside, mask=mask)
    linear_fisher_(torch.zeros(5, 60), x, grad_out, sample_scores=everywhere)
    special = torch.isnan if math.isnan(bad) else torch.isposinf
    assert torch.equal(special(fisher), ~mask)
    assert special(everywhere).tolist() == [False, True, False]
    assert_matches(inside, truth(x, grad_out, mask)[2], terms=300 * 4)


def test_linear_fisher_of_many_tokens(backend):
    for mean in (0.0, 1.0):
        x, grad_out = torch.randn(2, 1000, 5) + mean, torch.randn(2, 1000, 3) + mean
        check(x, grad_out)


def test_linear_fisher_accumulates_over_batches(backend):
    x, grad_out = problem((6, (4,), 5, 7))
    fisher = torch.zeros(5, 7)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        linear_fisher_(fisher, x[part], grad_out[part])
    assert_matches(fisher, truth(x, grad_out)[0], terms=24)


def run_all_outputs(x, grad_out, mask):
    fisher, bias = torch.ones(mask.shape), torch.ones(mask.shape[0])
    scores = torch.ones(len(x))
    linear_fisher_(fisher, x, grad_out, bias_fisher=bias, sample_scores=scores, mask=mask)
    return fisher, bias, scores


def test_linear_fisher_is_deterministic(backend):
    x, grad_out = problem((5, (9,), 34, 35))
    mask = torch.rand(34, 35) < 0.5
    first, second = (run_all_outputs(x, grad_out, mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(8, (32,), 130, 400), (8, (200,), 8, 900), (8, (200,), 900, 8), (3, (5,), 399, 401)],
    ids=str,
)
@pytest.mark.parametrize("scores", [True, False])
def test_linear_fisher_does_not_depend_on_threads(native, shape, scores):
    x, grad_out = problem(shape)
    mask = torch.rand(shape[2:]) < 0.5

    def run():
        if scores:
            return run_all_outputs(x, grad_out, mask)
        fisher, bias_fisher = torch.ones(mask.shape), torch.ones(len(mask))
        linear_fisher_(fisher, x, grad_out, bias_fisher=bias_fisher)
        return fisher, bias_fisher

    assert_same_with_any_threads(run)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_linear_fisher_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_many_shapes, isa)


def test_linear_fisher_into_float64_is_the_references(native):
    with pytest.raises(RuntimeError, match="float64"):
        linear_fisher_(torch.zeros(2, 3).double(), torch.ones(1, 3), torch.ones(1, 2))


ERRORS = {
    "x is 1-D": (ValueError, "same leading dimensions", {"x": (3,), "grad_out": (2,)}),
    "dimensions differ": (ValueError, "same leading dimensions", {"x": (4, 3)}),
    "samples differ": (ValueError, "same leading dimensions", {"x": (3, 5, 3)}),
    "tokens differ": (ValueError, "same leading dimensions", {"grad_out": (4, 6, 2)}),
    "fisher is transposed": (ValueError, r"fisher has shape \[3, 2\]", {"fisher": (3, 2)}),
    "fisher is bfloat16": (TypeError, "fisher has dtype", {"fisher": torch.bfloat16}),
    "x is integer": (TypeError, "x has dtype", {"x": torch.int64}),
    "grad_out is integer": (TypeError, "grad_out has dtype", {"grad_out": torch.int32}),
    "bias has a wrong shape": (ValueError, "bias_fisher has shape", {"bias_fisher": (3,)}),
    "bias is float16": (TypeError, "bias_fisher has dtype", {"bias_fisher": torch.float16}),
    "scores have a wrong shape": (ValueError, "sample_scores has", {"sample_scores": (5,)}),
    "scores are bfloat16": (TypeError, "sample_scores has", {"sample_scores": torch.bfloat16}),
    "mask without scores": (ValueError, "pass both or neither", {"sample_scores": None}),
    "mask is float": (TypeError, "mask has dtype", {"mask": torch.float32}),
    "mask is transposed": (ValueError, "mask has shape", {"mask": (3, 2)}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_linear_fisher_refuses(case):
    error, message, changes = ERRORS[case]
    arguments = {
        "fisher": torch.zeros(2, 3),
        "x": torch.ones(4, 5, 3),
        "grad_out": torch.ones(4, 5, 2),
        "bias_fisher": torch.zeros(2),
        "sample_scores": torch.zeros(4),
        "mask": torch.ones(2, 3, dtype=torch.bool),
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
        linear_fisher_(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor)
