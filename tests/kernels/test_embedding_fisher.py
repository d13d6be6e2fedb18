"""embedding_fisher_ on every backend, against per-sample gradients in float64."""

import itertools
import math

import pytest
import torch

from fishkern import _dispatch
from fishkern.functional import embedding_fisher_
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
    poisoned,
)
from tests.support.tolerances import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, token dimensions, V, H: ids that recur in a sample and over samples, ids that never occur,
# one row for all, no tokens, several token dimensions, more than a block of the compiled kernels.
SHAPES = [
    (3, (6,), 5, 7),
    (2, (4,), 50, 16),
    (4, (9,), 1, 10),
    (5, (), 4, 3),
    (2, (2, 3), 4, 5),
    (3, (5,), 6, 130),
    (2, (70,), 3, 9),
    (1, (1,), 1, 1),
]


def problem(shape, dtype=torch.float32, ids_dtype=torch.int64):
    num_samples, tokens, num_rows, size = shape
    ids = torch.randint(num_rows, (num_samples, *tokens)).to(ids_dtype)
    return ids, torch.randn(num_samples, *tokens, size).to(dtype), num_rows


def truth(ids, grad_out, num_rows, padding_idx=None, mask=None):
    """fisher and sample_scores from every sample's dense gradient, by an embedding in float64.

    On the CPU: there a width of zero is no illegal access.
    """
    device, ids, grad_out = ids.device, ids.cpu(), grad_out.cpu()
    layer = torch.nn.Embedding(
        num_rows, grad_out.shape[-1], padding_idx=padding_idx, device="cpu", dtype=torch.float64
    )
    fisher = torch.zeros_like(layer.weight, requires_grad=False)
    scores = fisher.new_zeros(len(ids))
    for n in range(len(ids)):
        layer.zero_grad()
        layer(ids[n]).backward(grad_out[n].double())
        square = layer.weight.grad.square()
        fisher += square
        scores[n] = (square if mask is None else square * mask.cpu()).sum()
    return fisher.to(device), scores.to(device)


def check(ids, grad_out, num_rows, padding_idx=None, mask=None):
    """Both outputs, each added to what is there."""
    expected = truth(ids, grad_out, num_rows, padding_idx, mask)
    outputs = [torch.full_like(e, 0.5, dtype=torch.float32) for e in expected]
    embedding_fisher_(
        outputs[0], ids, grad_out, padding_idx=padding_idx, sample_scores=outputs[1], mask=mask
    )
    alone = torch.zeros(outputs[0].shape)
    embedding_fisher_(alone, ids, grad_out, padding_idx=padding_idx)
    terms = max(ids.numel(), 1)
    assert_matches(alone, expected[0], terms=terms)
    assert_matches(outputs[0], expected[0] + 0.5, terms=terms)
    assert_matches(outputs[1], expected[1] + 0.5, terms=grad_out.numel())


def check_many_shapes():
    """Every shape in every dtype: what each instruction set is put through."""
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        ids, grad_out, num_rows = problem(shape, dtype)
        check(ids, grad_out, num_rows, mask=torch.rand(shape[2:]) < 0.5)
        check(ids, grad_out, num_rows, padding_idx=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_fisher_equals_per_sample_autograd(backend, shape, dtype):
    ids, grad_out, num_rows = problem(shape, dtype)
    check(ids, grad_out, num_rows)
    check(ids, grad_out, num_rows, padding_idx=num_rows - 1)
    check(ids, grad_out, num_rows, mask=torch.rand(shape[2:]) < 0.5)


def test_embedding_fisher_of_narrow_ids(backend):
    check(*problem((3, (6,), 5, 7), ids_dtype=torch.int32))


def test_embedding_fisher_of_float64_gradients(backend):
    ids, grad_out, num_rows = problem((3, (6,), 5, 7), torch.float64)
    if backend == "triton":
        with pytest.raises(TypeError, match="float64"):
            embedding_fisher_(torch.zeros(5, 7), ids, grad_out)
    else:
        check(ids, grad_out, num_rows)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("which", ["N", "T", "V", "H"])
def test_embedding_fisher_of_degenerate_sizes(backend, which, size):
    n, t, v, h = (size if letter == which else 4 for letter in "NTVH")
    if v == 0:  # then there can be no token either
        n = 0
    ids = torch.randint(max(v, 1), (n, t))
    check(ids, torch.randn(n, t, h), v)
    check(ids, torch.randn(n, t, h), v, mask=torch.ones(v, h, dtype=torch.bool))


def layouts():
    yield "features first", torch.randn(6, 5, 3).permute(2, 1, 0)
    yield "tokens first", torch.randn(5, 3, 6).transpose(0, 1)
    yield "every second feature", torch.randn(3, 5, 12)[..., ::2]
    yield "every second token", torch.randn(3, 10, 6)[:, ::2]
    yield "one sample for all", torch.randn(1, 5, 6).expand(3, 5, 6)
    yield "one number for all", torch.randn(()).expand(3, 5, 6)


@pytest.mark.parametrize("name", [name for name, _ in layouts()])
def test_embedding_fisher_of_strided_gradients(backend, name):
    grad_out = dict(layouts())[name]
    check(torch.randint(4, (3, 5)), grad_out, 4)
    check(torch.randint(4, (3, 5)), grad_out.to(torch.bfloat16), 4)


def test_embedding_fisher_of_strided_ids(backend):
    check(torch.randint(4, (5, 3)).T, torch.randn(3, 5, 6), 4)
    check(torch.arange(5).expand(3, 5), torch.randn(3, 5, 6), 5)  # positions
    check(torch.zeros((), dtype=torch.int64).expand(3, 5), torch.randn(3, 5, 6), 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_embedding_fisher_touches_nothing_outside_the_views(backend, transposed):
    ids, grad_out, num_rows = problem((3, (6,), 5, 130))
    expected = truth(ids, grad_out, num_rows)
    fisher = poisoned(torch.ones(130, 5) if transposed else torch.ones(5, 130))
    scores = poisoned(torch.ones(3))
    given = fisher.T if transposed else fisher
    embedding_fisher_(given, ids, poisoned(grad_out), sample_scores=scores)
    assert_matches(given.clone(), expected[0] + 1, terms=18)
    assert_matches(scores.clone(), expected[1] + 1, terms=grad_out.numel())
    assert fisher._base.isfinite().sum() == fisher.numel()
    assert scores._base.isfinite().sum() == 3


def test_embedding_fisher_squares_after_the_sum_over_a_samples_tokens(backend):
    fisher = torch.zeros(2, 1)
    embedding_fisher_(fisher, torch.tensor([[0, 0], [0, 1]]), torch.tensor([[[1.0], [-1]]] * 2))
    assert fisher[:, 0].tolist() == [1.0, 1.0]  # (1 - 1)^2 + 1^2, and 1^2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_fisher_of_integers_is_exact(backend, dtype):
    ids, grad_out = torch.randint(3, (4, 9)), torch.randint(-3, 4, (4, 9, 21)).to(dtype)
    mask = torch.rand(3, 21) < 0.5
    outputs = torch.ones(3, 21), torch.ones(4)
    embedding_fisher_(outputs[0], ids, grad_out, padding_idx=1, sample_scores=outputs[1], mask=mask)
    for actual, expected in zip(outputs, truth(ids, grad_out, 3, 1, mask), strict=True):
        assert torch.equal(actual.double(), expected + 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embedding_fisher_keeps_special_values_where_they_belong(backend, bad):
    grad_out = torch.randn(2, 3, 4)
    grad_out[0, 1, 2] = bad
    fisher, scores = torch.zeros(4, 4), torch.zeros(2)
    embedding_fisher_(fisher, torch.tensor([[0, 1, 2], [0, 1, 3]]), grad_out, sample_scores=scores)
    assert (~fisher.isfinite()).nonzero().tolist() == [[1, 2]]
    assert scores.isfinite().tolist() == [False, True]
    fisher = torch.zeros(4, 4)
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]])
    embedding_fisher_(fisher, ids, grad_out, padding_idx=1)
    assert fisher.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_embedding_fisher_refuses_ids_out_of_range_and_writes_nothing(backend, wrong):
    ids, grad_out, _ = problem((3, (6,), 5, 7))
    if ids.is_cuda:
        pytest.skip("an assertion on the device would end the process's use of it")
    ids[1, 2] = wrong
    for op in (embedding_fisher_, torch.ops.fishkern.embedding_fisher_):
        fisher, scores = torch.zeros(5, 7), torch.zeros(3)
        with pytest.raises((ValueError, RuntimeError), match="ids"):
            op(fisher, ids, grad_out, sample_scores=scores)
        assert not fisher.any()
        assert not scores.any()


def run(ids, grad_out, mask):
    fisher, scores = torch.ones(mask.shape), torch.ones(len(ids))
    embedding_fisher_(fisher, ids, grad_out, sample_scores=scores, mask=mask)
    return fisher, scores


def test_embedding_fisher_is_deterministic(backend):
    ids, grad_out, num_rows = problem((6, (20,), 4, 150))
    mask = torch.rand(num_rows, 150) < 0.5
    first, second = (run(ids, grad_out, mask) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_embedding_fisher_does_not_depend_on_threads(native):
    ids, grad_out, num_rows = problem((16, (64,), 20, 1000))
    mask = torch.rand(num_rows, 1000) < 0.5
    assert_same_with_any_threads(lambda: run(ids, grad_out, mask))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_embedding_fisher_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_many_shapes, isa)


def test_embedding_fisher_into_float64_is_the_references(native):
    ids, grad_out, num_rows = problem((3, (6,), 5, 7), torch.float64)
    fisher = torch.zeros(5, 7).double()
    with pytest.raises(RuntimeError, match="float64"):
        embedding_fisher_(fisher, ids, grad_out)
    with _dispatch.use_backend("reference"):
        embedding_fisher_(fisher, ids, grad_out)
    assert_matches(fisher, truth(ids, grad_out, num_rows)[0], torch.float64)


ERRORS = {
    "ids have features": (ValueError, "same leading dimensions", {"ids": (4, 5, 3)}),
    "samples differ": (ValueError, "same leading dimensions", {"ids": (3, 5)}),
    "tokens differ": (ValueError, "same leading dimensions", {"grad_out": (4, 6, 3)}),
    "fisher is 1-D": (ValueError, r"expected \[V, H\]", {"fisher": (6,)}),
    "fisher is transposed": (ValueError, r"fisher has shape \[3, 6\]", {"fisher": (3, 6)}),
    "fisher is bfloat16": (TypeError, "fisher has dtype", {"fisher": torch.bfloat16}),
    "ids are floats": (TypeError, "ids have dtype", {"ids": torch.float32}),
    "grad_out is integer": (TypeError, "grad_out has dtype", {"grad_out": torch.int32}),
    "scores have a wrong shape": (ValueError, "sample_scores has", {"sample_scores": (5,)}),
    "mask without scores": (ValueError, "pass both or neither", {"sample_scores": None}),
    "mask is float": (TypeError, "mask has dtype", {"mask": torch.float32}),
    "mask is transposed": (ValueError, "mask has shape", {"mask": (3, 6)}),
    "padding is no row": (ValueError, "padding_idx is 6", {"padding_idx": 6}),
    "padding is negative": (ValueError, "padding_idx is -1", {"padding_idx": -1}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_embedding_fisher_refuses(case):
    error, message, changes = ERRORS[case]
    arguments = {
        "fisher": torch.zeros(6, 3),
        "ids": torch.ones(4, 5, dtype=torch.int64),
        "grad_out": torch.ones(4, 5, 3),
        "sample_scores": torch.zeros(4),
        "mask": torch.ones(6, 3, dtype=torch.bool),
        "padding_idx": 0,
    }
    for name, change in changes.items():
        if isinstance(change, tuple):
            arguments[name] = torch.ones(change, dtype=arguments[name].dtype)
        elif isinstance(change, torch.dtype):
            arguments[name] = arguments[name].to(change)
        else:
            arguments[name] = change
    before = {name: t.clone() for name, t in arguments.items() if torch.is_tensor(t)}
    with pytest.raises(error, match=message):
        embedding_fisher_(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor)


def test_embedding_fisher_itself_says_which_shape_it_expects(native):
    """The functional door refuses these before; this is for callers of the op itself."""
    ids, grad_out = torch.ones(4, 5, dtype=torch.int64), torch.ones(4, 6, 3)
    message = r"grad_out has shape \[4, 6, 3\], expected \[4, 5, 3\]"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fishkern.embedding_fisher_(torch.zeros(6, 3), ids, grad_out)
