"""linear_selected_grad_ on every backend and route, against the dense gradient in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fishkern import _dispatch
from fishkern.functional import linear_selected_grad_, plan_selected_grad
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
    poisoned,
)
from tests.support.tolerances import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTES = ["tiles", "columns", "rows"]

# Leading dimensions, O, I: round, odd, narrow, no leading dimension, several.
SHAPES = [
    ((2, 8), 16, 32),
    ((3, 5), 7, 11),
    ((37,), 65, 3),
    ((2, 9), 4, 67),
    ((), 13, 6),
    ((2, 2, 3), 9, 10),
    ((1, 1), 1, 1),
]
# More than a block of rows and a chunk of tokens of the compiled kernel, and of the Triton one.
LARGE_SHAPES = [((3, 200), 70, 130), ((300,), 131, 70)]


def problem(shape, dtype=torch.float32, grad_dtype=None):
    leading, num_outputs, num_inputs = shape
    x = torch.randn(*leading, num_inputs).to(dtype)
    return x, torch.randn(*leading, num_outputs).to(grad_dtype or dtype)


def truth(x, grad_out):
    """The whole gradient in float64, flat."""
    tokens = math.prod(x.shape[:-1])
    x, grad_out = (t.double().reshape(tokens, t.shape[-1]) for t in (x, grad_out))
    return torch.einsum("po,pi->oi", grad_out, x).flatten()


def draw(shape, density, dtype=torch.int32):
    """Positions drawn with this probability; the corners always, if anything is."""
    size = shape[0] * shape[1]
    chosen = torch.rand(size) < density
    if density > 0 and size > 0:
        chosen[[0, -1]] = True
    return chosen.nonzero().squeeze(1).to(dtype)


def rounding(route, x, grad_out, backend):
    """bfloat16's dense product on a CPU rounds its sums once; nothing else rounds a sum."""
    rounds = route != "tiles" and backend == "native" and x.dtype == grad_out.dtype
    return torch.bfloat16 if rounds and x.dtype == torch.bfloat16 else torch.float32


def check(x, grad_out, indices, route=None, backend=None):
    """Without a plan, and by the route or all of them."""
    shape = (grad_out.shape[-1], x.shape[-1])
    expected = truth(x, grad_out)[indices.long()]
    terms = max(math.prod(x.shape[:-1]), 1)
    plain = torch.zeros(len(indices))
    linear_selected_grad_(plain, x, grad_out, indices)
    assert_matches(plain, expected, terms=terms)
    for name in [route] if route else ROUTES:
        planned = torch.zeros(len(indices))
        plan = plan_selected_grad(indices, shape, route=name)
        linear_selected_grad_(planned, x, grad_out, plan)
        dtype = rounding(name, x, grad_out, backend)
        assert_matches(planned, expected, dtype, terms=1 if dtype != torch.float32 else terms)


def check_many_shapes():
    """Every shape in every dtype: what each instruction set is put through."""
    for shape, dtype in itertools.product(SHAPES + LARGE_SHAPES, DTYPES):
        x, grad_out = problem(shape, dtype)
        for density in (0.02, 0.4, 1.0):
            check(x, grad_out, draw(shape[1:], density), backend="native")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selected_grad_equals_autograd(backend, shape, route):
    x, grad_out = problem(shape)
    layer = torch.nn.Linear(shape[2], shape[1], bias=False).double()
    layer(x.double()).backward(grad_out.double())
    indices = draw(shape[1:], 0.3)
    selected = torch.zeros(len(indices))
    plan = plan_selected_grad(indices, shape[1:], route=route)
    assert plan.route == route
    linear_selected_grad_(selected, x, grad_out, plan)
    truth = layer.weight.grad.flatten()[indices.long()]
    assert_matches(selected, truth, terms=x[..., 0].numel())


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selected_grad_of_dtypes(backend, shape, dtype, density):
    x, grad_out = problem(shape, dtype)
    check(x, grad_out, draw(shape[1:], density), backend=backend)
    check(x, grad_out, draw(shape[1:], density, torch.int64), backend=backend)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_selected_grad_of_large_shapes(native, shape, route):
    x, grad_out = problem(shape)
    check(x, grad_out, draw(shape[1:], 0.01), route)
    check(x, grad_out, draw(shape[1:], 0.5), route)


def test_bfloat16_is_as_exact_as_the_dense_gradient(native):
    shape = ((512,), 96, 80)
    x, grad_out = problem(shape, torch.bfloat16)
    indices = draw(shape[1:], 0.3)
    expected = truth(x, grad_out)[indices.long()]
    dense = (grad_out.T @ x).flatten()[indices.long()]
    allowed = (dense.double() - expected).abs().max()
    for route in ROUTES:
        selected = torch.zeros(len(indices))
        plan = plan_selected_grad(indices, shape[1:], route=route)
        linear_selected_grad_(selected, x, grad_out, plan)
        assert (selected - expected).abs().max() <= allowed * 1.01


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_selected_grad_of_two_dtypes(backend, dtypes):
    check(*problem(((3, 4), 5, 6), *dtypes), draw((5, 6), 0.4), backend=backend)


@pytest.mark.parametrize("route", ROUTES)
def test_selected_grad_in_float64_is_the_references(route):
    x, grad_out = problem(((3, 40), 15, 16), torch.float64)
    indices = draw((15, 16), 0.3)
    plan = plan_selected_grad(indices, (15, 16), route=route)
    selected = torch.zeros(len(indices), dtype=torch.float64)
    with _dispatch.use_backend("reference"):
        linear_selected_grad_(selected, x, grad_out, plan)
    assert_matches(selected, truth(x, grad_out)[indices.long()], torch.float64)
    with _dispatch.use_backend("native"), pytest.raises(RuntimeError, match="reference"):
        linear_selected_grad_(selected, x, grad_out, plan)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("which", ["N", "T", "O", "I"])
def test_selected_grad_of_degenerate_sizes(backend, which, size):
    n, t, o, i = (size if letter == which else 4 for letter in "NTOI")
    for density in (0.0, 0.5, 1.0):
        check(*problem(((n, t), o, i)), draw((o, i), density))


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
def test_selected_grad_of_strided_inputs(backend, name):
    x = dict(layouts())[name]
    other = torch.randn(3, 5, 4)
    check(x, other, draw((4, 6), 0.4))
    check(other, x, draw((6, 4), 0.4))
    check(x.to(torch.bfloat16), other, draw((4, 6), 0.4), backend=backend)


def test_selected_grad_of_dimensions_that_cannot_be_joined(backend):
    x = torch.randn(3, 4, 2, 6).transpose(1, 2)
    check(x, torch.randn(3, 2, 4, 5), draw((5, 6), 0.4))


@pytest.mark.parametrize("route", ROUTES)
def test_selected_grad_of_strided_indices_and_result(backend, route):
    x, grad_out = problem(((3, 5), 7, 11))
    indices = torch.stack([draw((7, 11), 0.3)] * 2, 1)[:, 0]
    plan = plan_selected_grad(indices, (7, 11), route=route)
    for given in (indices, plan):
        selected = torch.ones(len(indices), 2)
        linear_selected_grad_(selected[:, 1], x, grad_out, given)
        assert_matches(selected[:, 1], truth(x, grad_out)[indices.long()] + 1, terms=15)
        assert (selected[:, 0] == 1).all()


@pytest.mark.parametrize("shape", [*SHAPES[:4], ((20,), 70, 67)], ids=str)
def test_selected_grad_reads_and_writes_nothing_outside_the_views(backend, shape):
    x, grad_out = (poisoned(t) for t in problem(shape))
    indices = draw(shape[1:], 0.2)
    check(x, grad_out, indices)
    for route in ROUTES:
        selected = poisoned(torch.ones(len(indices)))
        plan = plan_selected_grad(indices, shape[1:], route=route)
        linear_selected_grad_(selected, x, grad_out, plan)
        assert_matches(selected.clone(), truth(x, grad_out)[indices.long()] + 1, terms=300)
        assert selected._base.isfinite().sum() == len(indices)


# numpy, which stands in for the hardware in the interpreter, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_selected_grad_keeps_special_values_where_they_belong(backend, bad, route):
    x, grad_out = problem(((3, 4), 5, 6))
    x[1, 2, 3] = bad
    indices = torch.arange(30)
    selected = torch.zeros(30)
    plan = plan_selected_grad(indices, (5, 6), route=route)
    linear_selected_grad_(selected, x, grad_out, plan)
    assert (~selected.isfinite()).tolist() == [i % 6 == 3 for i in range(30)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_selected_grad_of_integers_is_exact(backend, dtype, route):
    x = torch.randint(-3, 4, (4, 6, 21)).to(dtype)
    grad_out = torch.randint(-3, 4, (4, 6, 18)).to(dtype)
    indices = draw((18, 21), 0.3)
    selected = torch.ones(len(indices))
    plan = plan_selected_grad(indices, (18, 21), route=route)
    linear_selected_grad_(selected, x, grad_out, plan)
    assert torch.equal(selected.double(), truth(x, grad_out)[indices.long()] + 1)


@pytest.mark.parametrize("route", ROUTES)
def test_selected_grad_accumulates_over_batches(backend, route):
    x, grad_out = problem(((6, 4), 5, 7))
    indices = draw((5, 7), 0.4)
    plan = plan_selected_grad(indices, (5, 7), route=route)
    selected = torch.zeros(len(indices))
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        linear_selected_grad_(selected, x[part], grad_out[part], plan)
    assert_matches(selected, truth(x, grad_out)[indices.long()], terms=24)


def run(x, grad_out, indices, route):
    selected = torch.ones(len(indices))
    shape = (grad_out.shape[-1], x.shape[-1])
    plan = plan_selected_grad(indices, shape, route=route)
    linear_selected_grad_(selected, x, grad_out, plan)
    return selected


@pytest.mark.parametrize("route", ROUTES)
def test_selected_grad_is_deterministic(backend, route):
    x, grad_out = problem(((5, 40), 17, 19))
    indices = draw((17, 19), 0.3)
    assert torch.equal(run(x, grad_out, indices, route), run(x, grad_out, indices, route))


def test_tiles_do_not_depend_on_threads(native):
    x, grad_out = problem(((8, 64), 130, 200))
    indices = draw((130, 200), 0.2)
    assert_same_with_any_threads(lambda: [run(x, grad_out, indices, "tiles")])


def test_tiles_in_triton_may_be_of_any_shape_and_split():
    reason = _dispatch.why_not("triton")
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    from fishkern.backends.triton.linear import Config
    from fishkern.backends.triton.selected_grad import linear_selected_grad_ as kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, grad_out = (t.to(device) for t in problem(((7, 11), 33, 50)))
    indices = draw((33, 50), 0.1).to(device)
    expected = truth(x, grad_out)[indices.long()] + 1
    for config in (Config(16, 16, 16, 4, 2), Config(16, 64, 16, 4, 3), Config(32, 16, 64, 4, 1)):
        for splits in (1, 2, 5):
            first, again = (torch.ones(len(indices), device=device) for _ in range(2))
            kernel(first, x, grad_out, indices, config=config, splits=splits)
            kernel(again, x, grad_out, indices, config=config, splits=splits)
            assert_matches(first, expected, terms=77)
            assert torch.equal(first, again)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_selected_grad_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_many_shapes, isa)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_the_gradient_is_never_there_as_a_whole(native, name, route):
    shape = ((2, 3), 1500, 1000)
    x, grad_out = problem(shape)
    indices = draw(shape[1:], 0.01)
    plan = plan_selected_grad(indices, shape[1:], route=route)
    selected = torch.zeros(len(indices))
    run = _dispatch.backend(name)[0].linear_selected_grad_
    with Largest() as largest:
        run(selected, x, grad_out, plan.indices, rows=plan.rows, columns=plan.columns)
    assert largest.numel <= 2**18
    assert_matches(selected, truth(x, grad_out)[indices.long()], terms=6)


@pytest.mark.parametrize("route", [None, *ROUTES])
def test_selected_grad_inside_a_compiled_graph(route):
    x, grad_out = problem(((6,), 4, 5))
    indices = draw((4, 5), 0.3)
    given = plan_selected_grad(indices, (4, 5), route=route) if route else indices

    def twice(selected, x, grad_out):
        linear_selected_grad_(selected, x, grad_out, given)
        return selected * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    result = compiled(torch.zeros(len(indices)), x, grad_out)
    assert_matches(result, 2 * truth(x, grad_out)[indices.long()], terms=6)


ERRORS = {
    "x has no dimension": (ValueError, "same leading dimensions", {"x": torch.ones(())}),
    "dimensions differ": (ValueError, "same leading dimensions", {"x": torch.ones(4, 3)}),
    "tokens differ": (ValueError, "same leading dimensions", {"x": torch.ones(4, 6, 3)}),
    "x is integer": (TypeError, "x has dtype", {"x": torch.ones(4, 5, 3).int()}),
    "grad_out is integer": (
        TypeError,
        "grad_out has dtype",
        {"grad_out": torch.ones(4, 5, 2).int()},
    ),
    "indices are short": (TypeError, "int32 or int64", {"indices": torch.tensor([0, 5]).short()}),
    "indices are a mask": (TypeError, "int32 or int64", {"indices": torch.ones(2).bool()}),
    "indices are 2-D": (ValueError, "flat positions", {"indices": torch.tensor([[0, 5]])}),
    "an index is too large": (ValueError, "hold 6", {"indices": torch.tensor([0, 6])}),
    "an index is negative": (ValueError, "hold -1", {"indices": torch.tensor([-1, 5])}),
    "indices descend": (ValueError, "ascend", {"indices": torch.tensor([5, 0])}),
    "an index is twice there": (ValueError, "twice", {"indices": torch.tensor([5, 5])}),
    "there are more indices": (ValueError, "selected_grad has", {"indices": torch.arange(3)}),
    "selected_grad is 2-D": (ValueError, "selected_grad has", {"selected_grad": torch.ones(2, 1)}),
    "selected_grad is half": (
        TypeError,
        "selected_grad has",
        {"selected_grad": torch.ones(2).half()},
    ),
    "the plan is another's": (
        ValueError,
        r"the plan is for a matrix \[3, 2\]",
        {"indices": plan_selected_grad(torch.tensor([0, 5]), (3, 2))},
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_selected_grad_refuses(case):
    error, message, changes = ERRORS[case]
    arguments = {
        "selected_grad": torch.ones(2),
        "x": torch.ones(4, 5, 3),
        "grad_out": torch.ones(4, 5, 2),
        "indices": torch.tensor([0, 5]),
        **changes,
    }
    before = arguments["selected_grad"].clone()
    with pytest.raises(error, match=message):
        linear_selected_grad_(**arguments)
    assert torch.equal(arguments["selected_grad"], before)


@pytest.mark.parametrize(
    "indices", [[0, 6], [-1, 5], [5, 0], [5, 5]], ids=["large", "negative", "descending", "twice"]
)
def test_the_op_itself_refuses_wrong_indices(native, indices):
    selected = torch.zeros(2)
    with pytest.raises(RuntimeError, match="indices must ascend from 0 to 5"):
        torch.ops.fishkern.linear_selected_grad_(
            selected, torch.ones(4, 3), torch.ones(4, 2), torch.tensor(indices)
        )
    assert not selected.any()
