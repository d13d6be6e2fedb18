"""masked_adamw_quantized_ against torch.optim.AdamW in float64, between reading and storing."""

import pytest
import torch

from fishkern import _dispatch
from fishkern.functional import (
    dequantize_moment,
    masked_adamw_quantized_,
    quantize_moment,
)
from tests.kernels.test_quantized_moments import resolution
from tests.support.kernels import (
    INSTRUCTION_SETS,
    assert_same_with_any_threads,
    pass_on_instruction_set,
)
from tests.support.tolerances import assert_matches

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
NARROW = [torch.bfloat16, torch.uint8]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPERATIONS = 12  # of a step, each with a rounding

of_either_kind = pytest.mark.parametrize("state_dtype", NARROW)


def zeros(count, state_dtype):
    """A moment of zeros and its scales, as lists: of one tensor, and of one or none."""
    in_bytes = state_dtype == torch.uint8
    scales = [torch.zeros(-(-count // 32), dtype=torch.uint8)] if in_bytes else []
    return [torch.zeros(count, dtype=state_dtype)], scales


class Case:
    """Tensors, masked and whole, with their moments in a narrow dtype."""

    def __init__(self, state_dtype, dtype=torch.float32, grad_dtype=None, **options):
        index_dtype = options.get("index_dtype", torch.int64)
        sizes = options.get("sizes", {(40, 9): 77, (5, 9): 0, (3, 4): 12})
        self.params = [torch.randn(shape).to(dtype) for shape in sizes]
        self.indices = [
            torch.randperm(p.numel())[:k].sort().values.to(index_dtype)
            for p, k in zip(self.params, sizes.values(), strict=True)
        ]
        self.before = [p.clone() for p in self.params]
        grads = [torch.randn(p.shape) * (2 * torch.randn(p.shape)).exp() for p in self.params]
        if options.get("selected"):
            grads = [self.chosen(g, i) for i, g in enumerate(grads)]
        self.grads = [g.to(grad_dtype or dtype) for g in grads]
        states = [
            [zeros(i.numel() or p.numel(), state_dtype) for _ in range(2)]
            for i, p in zip(self.indices, self.params, strict=True)
        ]
        self.moments = [[state[kind][0][0] for state in states] for kind in range(2)]
        self.scales = [[s for state in states for s in state[kind][1]] for kind in range(2)]
        self.masters = [self.chosen(p, i).float() for i, p in enumerate(self.params)]
        self.masters = self.masters if options.get("masters") else []

    def chosen(self, tensor, i):
        flat = tensor.reshape(-1)
        return flat[self.indices[i].long()] if self.indices[i].numel() else flat.clone()

    def run(self, step=1, **options):
        options = {"steps": [step] * len(self.params), **HYPER, **options}
        masked_adamw_quantized_(
            self.params, self.grads, self.indices, *self.moments, masters=self.masters,
            exp_avg_scales=self.scales[0], exp_avg_sq_scales=self.scales[1], **options,
        )  # fmt: skip

    def moment(self, i, kind):
        scale = self.scales[kind][i] if self.scales[kind] else None
        return dequantize_moment(self.moments[kind][i], scale, signed=kind == 0)

    def values(self, i):
        return self.masters[i] if self.masters else self.chosen(self.params[i], i)

    def stored(self):
        return [t for kind in (*self.moments, *self.scales) for t in kind]

    def tensors(self):
        return [*self.params, *self.masters, *self.stored()]


def truth_of(case, i, step, **options):
    """The values and both moments after torch's step, in float64, from what is stored."""
    leaf = torch.nn.Parameter(case.values(i).double())
    optimizer = torch.optim.AdamW([leaf], **{**HYPER, **options}, foreach=False)
    optimizer.state[leaf] = {
        "step": torch.tensor(step - 1.0),
        "exp_avg": case.moment(i, 0).double(),
        "exp_avg_sq": case.moment(i, 1).double(),
    }
    grad = case.grads[i]
    grad = grad if grad.numel() == leaf.numel() else case.chosen(grad, i)
    leaf.grad = grad.reshape(-1).double()
    optimizer.step()
    state = optimizer.state[leaf]
    return leaf.detach(), state["exp_avg"], state["exp_avg_sq"]


def check(case, steps=3, **options):
    dtype = torch.float32 if case.masters else case.params[0].dtype
    state_dtype = case.moments[0][0].dtype
    for step in range(1, steps + 1):
        truths = [truth_of(case, i, step, **options) for i in range(len(case.params))]
        case.run(step, **options)
        for i, (value, *moments) in enumerate(truths):
            assert_matches(case.values(i), value, dtype, OPERATIONS)
            if case.masters:
                param = case.params[i]
                assert torch.equal(case.chosen(param, i), case.masters[i].to(param.dtype))
            for kind, exact in enumerate(moments):
                error = (case.moment(i, kind).double() - exact).abs()
                assert (error <= resolution(exact, state_dtype, kind == 0) * (1 + 1e-4)).all()
    for param, before, index in zip(case.params, case.before, case.indices, strict=True):
        outside = torch.ones(param.numel(), dtype=torch.bool)
        outside[index.long() if index.numel() else slice(None)] = False
        assert torch.equal(param.reshape(-1)[outside], before.reshape(-1)[outside])


@of_either_kind
@pytest.mark.parametrize("masters", [False, True], ids=["alone", "masters"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_equals_adamw_between_reading_and_storing(backend, state_dtype, dtype, masters):
    check(Case(state_dtype, dtype, masters=masters))


@of_either_kind
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("selected", [True, False], ids=["selected", "dense"])
def test_gradients_and_indices_of_every_form(backend, state_dtype, selected, index_dtype):
    for grad_dtype in FLOATS:
        case = Case(
            state_dtype, torch.bfloat16, grad_dtype, selected=selected, index_dtype=index_dtype
        )
        check(case, steps=2)


@of_either_kind
@pytest.mark.parametrize(
    "options",
    [{"maximize": True}, {"weight_decay": 5.0}, {"betas": (0.0, 0.5)}, {"eps": 1e-3}],
    ids=str,
)
def test_options(backend, state_dtype, options):
    check(Case(state_dtype), **options)


@of_either_kind
@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 256, 257, 299])
def test_sizes(backend, state_dtype, k):
    check(Case(state_dtype, sizes={(300,): k}), steps=2)


@of_either_kind
def test_nothing_selected(backend, state_dtype):
    param, index = torch.randn(3, 4), torch.empty(0).int()
    before = param.clone()
    (m, of_m), (v, of_v) = zeros(0, state_dtype), zeros(0, state_dtype)
    masked_adamw_quantized_(
        [param], [torch.ones(3, 4)], [index], m, v, steps=[1], exp_avg_scales=of_m,
        exp_avg_sq_scales=of_v, **HYPER,
    )  # fmt: skip
    masked_adamw_quantized_([], [], [], [], [], steps=[], **HYPER)
    assert torch.equal(param, before)


@of_either_kind
def test_strides(backend, state_dtype):
    case, same = (Case(state_dtype, sizes={(40, 9): 77}) for _ in range(2))
    same.indices, same.before = case.indices, case.before
    room = torch.full((9, 100), 5.0)
    view = room[:, 3:83:2].T
    view.copy_(case.params[0])
    same.params = [view]
    same.grads = [case.grads[0].T.contiguous().T]
    for step in (1, 2):
        case.run(step)
        same.run(step)
    assert all(map(torch.equal, case.tensors(), same.tensors()))
    assert (room == 5.0).sum() == room.numel() - view.numel()


@of_either_kind
def test_two_cohorts_of_one_tensor(backend, state_dtype):
    """Entries with step counts of their own are list entries of their own, over one tensor."""
    case = Case(state_dtype, sizes={(40, 9): 77, (9, 40): 50})
    every = torch.randperm(360)
    case.indices = [every[:77].sort().values, every[77:127].sort().values]
    case.params[1] = case.params[0]
    case.grads[1] = case.grads[0]
    steps = [100, 1]
    truths = [truth_of(case, i, step) for i, step in enumerate(steps)]
    case.run(steps=steps)
    for i, (value, *moments) in enumerate(truths):
        assert_matches(case.values(i), value, terms=OPERATIONS)
        for kind, exact in enumerate(moments):
            error = (case.moment(i, kind).double() - exact).abs()
            assert (error <= resolution(exact, state_dtype, kind == 0) * (1 + 1e-4)).all()
    rest = every[127:]
    assert torch.equal(case.params[0].view(-1)[rest], case.before[0].view(-1)[rest])


@of_either_kind
def test_scaling_maximizing_and_skipping(backend, state_dtype):
    torch.manual_seed(5)
    plain = Case(state_dtype)
    torch.manual_seed(5)
    scaled = Case(state_dtype)
    scaled.grads = [-8 * g for g in scaled.grads]
    before = [t.clone() for t in scaled.tensors()]
    scale = torch.tensor(8.0)
    scaled.run(grad_scale=scale, maximize=True, found_inf=torch.tensor(1.0))
    assert all(map(torch.equal, before, scaled.tensors()))
    plain.run()
    scaled.run(grad_scale=scale, maximize=True, found_inf=torch.tensor(0.0))
    assert all(map(torch.equal, plain.tensors(), scaled.tensors()))


@of_either_kind
def test_steps_and_lr_as_tensors(backend, state_dtype):
    torch.manual_seed(5)
    numbers = Case(state_dtype)
    torch.manual_seed(5)
    tensors = Case(state_dtype)
    numbers.run(3)
    lr = torch.tensor(HYPER["lr"], dtype=torch.float64)
    tensors.run(steps=[torch.tensor(3.0)] * len(tensors.params), lr=lr)
    assert all(map(torch.equal, numbers.tensors(), tensors.tensors()))


@of_either_kind
def test_backends_store_the_same_bits(backend, state_dtype):
    """Where the float32 arithmetic is exact, since its last bit is each backend's own."""
    results = []
    for name in ("reference", backend):
        torch.manual_seed(3)
        case = Case(state_dtype)
        for i, grad in enumerate(case.grads):  # 12 bits: their squares have no more than 24
            digits = torch.randint(-2047, 2048, grad.shape)
            case.grads[i] = digits * 2.0 ** torch.randint(-12, 3, grad.shape)
        with _dispatch.use_backend(name):
            case.run(7, betas=(0.5, 0.75))
        results.append(case.stored())
    assert all(map(torch.equal, *results))


# numpy, which stands in for the hardware in the interpreter, warns of what is tested here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@of_either_kind
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000], ids=hex)
def test_a_gradient_that_is_not_finite_is_seen_in_the_moments(backend, state_dtype, bits):
    """NaN as CPUs make it and as GPUs do, NaN with a sign, and both infinities."""
    case = Case(state_dtype, sizes={(100,): 70})
    case.grads[0].view(torch.int32)[case.indices[0][40]] = bits
    case.run()
    spoilt = torch.arange(70) == 40
    assert torch.equal(~case.values(0).isfinite(), spoilt)
    if state_dtype == torch.uint8:
        spoilt = torch.arange(70) // 32 == 1  # the block
        for scale in case.scales:
            assert (scale[0] == 255).tolist() == [False, True, False]
    for kind in range(2):
        assert torch.equal(~case.moment(0, kind).isfinite(), spoilt)


@of_either_kind
def test_second_moments_follow_although_a_step_changes_less_than_they_resolve(backend, state_dtype):
    """g^2 is 1 until v has settled, then 0.25: v comes down, by 0.75e-3 of itself a step."""
    steps, entries = (60, 640) if backend == "triton" else (1000, 640)
    m, of_m = zeros(entries, state_dtype)
    v, of_v = quantize_moment(torch.ones(entries), state_dtype, signed=False)
    of_v, whole = [] if of_v is None else [of_v], torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        masked_adamw_quantized_(
            [torch.zeros(entries)], [torch.full((entries,), 0.5)], [whole], m, [v], steps=[step],
            exp_avg_scales=of_m, exp_avg_sq_scales=of_v, **HYPER,
        )  # fmt: skip
    moved = quantize_moment(torch.full((entries,), 0.99925), state_dtype, signed=False)
    assert (dequantize_moment(*moved, signed=False) == 1).all(), "to nearest, it would stand still"
    truth = 0.25 + 0.75 * 0.999**steps
    found = dequantize_moment(v, *of_v, signed=False)
    # A random walk of small steps: the variance is at most drift times distance, summed.
    distance = 2.0**-7 if state_dtype == torch.bfloat16 else 2.0**-4
    walk = (0.00075 * distance * steps) ** 0.5
    assert abs(found.mean().item() - truth) < 5 * walk / entries**0.5
    assert (found - truth).abs().max().item() < 6 * walk + distance


def large_case(state_dtype):
    """More entries than one thread takes, in tensors that end within a block."""
    torch.manual_seed(0)
    case = Case(state_dtype, sizes={(401, 301): 70001, (7,): 3, (301,): 0})
    for step in (1, 2):
        case.run(step)
    return case.tensors()


@of_either_kind
def test_native_same_bits_with_any_threads(native, state_dtype):
    assert_same_with_any_threads(lambda: large_case(state_dtype))


def check_against_reference():
    """The narrow moments are those of plain torch, but where float32's last bit differs."""
    for state_dtype in NARROW:
        found = large_case(state_dtype)
        with _dispatch.use_backend("reference"):
            expected = large_case(state_dtype)
        for a, b in zip(found, expected, strict=True):
            if a.is_floating_point() and a.dtype == torch.float32:
                assert_matches(a, b.double(), terms=OPERATIONS)
            else:
                assert (a != b).double().mean() < 1e-3


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_native_on_every_instruction_set(native, isa):
    pass_on_instruction_set(check_against_reference, isa)


ONE, TWO, INDEX = torch.ones(4), torch.zeros(2, dtype=torch.uint8), torch.tensor([1, 2])
SCALE = torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"exp_avgs": [ONE[:2]]}, TypeError, r"exp_avgs\[0\] has dtype torch.float32"),
        ({"exp_avg_sqs": [TWO.bfloat16()]}, TypeError, "pass one dtype"),
        ({"exp_avg_scales": []}, ValueError, "exp_avg_scales has 0 entries, but needs 1"),
        ({"exp_avg_sq_scales": [TWO]}, ValueError, "2 entries, but 2 moments have 1 scales"),
        ({"exp_avg_scales": [SCALE.int()]}, TypeError, "torch.int32: pass uint8"),
        ({"params": [ONE.double()]}, TypeError, r"params\[0\] is float64: use masked_adamw_"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] has shape"),
        ({"indices": [torch.tensor([1, 4])]}, ValueError, r"indices\[0\] holds 4"),
        ({"steps": [1, 2]}, ValueError, "steps has 2 entries"),
    ],
)
def test_refusals(changes, error, match):
    arguments = {
        "params": [torch.ones(4)], "grads": [ONE], "indices": [INDEX], "exp_avgs": [TWO],
        "exp_avg_sqs": [TWO], "exp_avg_scales": [SCALE], "exp_avg_sq_scales": [SCALE],
        "steps": [1],
    }  # fmt: skip
    arguments |= changes
    with pytest.raises(error, match=match):
        masked_adamw_quantized_(**arguments, **HYPER)
    assert torch.equal(arguments["params"][0].float(), ONE)
