"""masked_adamw_ against torch.optim.AdamW, run in float64 on the selected entries alone."""

import pytest
import torch

from fishkern.functional import masked_adamw_
from tests.support.tolerances import assert_matches

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# The interpreter computes with numpy, which warns of what is not finite.
not_finite = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# float32's unit is for one rounding of each input; a step is a dozen operations.
OPERATIONS = 12


def some_indices(numel, k, dtype=torch.int64):
    return torch.randperm(numel)[:k].sort().values.to(dtype)


def state(index, param):
    """Zeros for every selected entry; an empty index list stands for all."""
    return torch.zeros(index.numel() or param.numel())


def oracle(values, grads, masters=True, **options):
    """``values`` (1-D) after a step of torch's AdamW for each of ``grads``, in float64.

    ``masters``: False rounds to the dtype of ``values`` after every step.
    """
    hyper = {**HYPER, **options}
    leaf = torch.nn.Parameter(values.double().clone())
    optimizer = torch.optim.AdamW([leaf], **hyper, foreach=False)
    for grad in grads:
        leaf.grad = grad.double().clone()
        optimizer.step()
        if not masters:
            leaf.data = leaf.data.to(values.dtype).double()
    return leaf.detach(), optimizer.state[leaf]


class Case:
    """One tensor with its selected entries and a gradient for each step."""

    def __init__(self, shape, k, dtype=torch.float32, index_dtype=torch.int64, steps=3):
        self.param = torch.randn(shape).to(dtype)
        self.index = some_indices(self.param.numel(), k, index_dtype)
        self.before = self.param.clone()
        self.grads = [torch.randn(shape).to(dtype) for _ in range(steps)]
        self.m, self.v = state(self.index, self.param), state(self.index, self.param)
        self.v_max = torch.zeros_like(self.v)

    def selected(self, tensor):
        flat = tensor.reshape(-1)
        return flat[self.index.long()] if self.index.numel() else flat

    def run(self, amsgrad=False, change_grad=lambda grad: grad, **options):
        for i, grad in enumerate(self.grads):
            masked_adamw_(
                [self.param], [change_grad(grad)], [self.index], [self.m], [self.v],
                steps=[i + 1], max_exp_avg_sqs=[self.v_max] if amsgrad else (),
                **{**HYPER, **options},
            )  # fmt: skip

    def check(self, dtype=torch.float32, **options):
        truth, moments = oracle(
            self.selected(self.before), [self.selected(g) for g in self.grads], False, **options
        )
        terms = OPERATIONS * len(self.grads)
        assert_matches(self.selected(self.param), truth, dtype, terms)
        assert_matches(self.m, moments["exp_avg"], torch.float32, terms)
        assert_matches(self.v, moments["exp_avg_sq"], torch.float32, terms)
        outside = torch.ones(self.param.numel(), dtype=torch.bool)
        outside[self.index.long() if self.index.numel() else slice(None)] = False
        assert torch.equal(self.param.reshape(-1)[outside], self.before.reshape(-1)[outside])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"weight_decay": 5.0},
        {"betas": (0.0, 0.5)},
        {"betas": (0.4, 0.99), "eps": 1e-3},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_masked_adamw_equals_torch_over_many_steps(backend, options):
    case = Case((7, 19), 61, steps=30)
    case.run(**options)
    case.check(**options)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_adamw_dtypes(backend, dtype, index_dtype):
    case = Case((13, 11), 70, dtype, index_dtype)
    case.run()
    case.check(dtype)


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 127, 128, 129, 299, 300])
def test_masked_adamw_sizes(backend, k):
    case = Case((300,), k)
    case.run(amsgrad=True)
    case.check(amsgrad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7, 11)], ids=str)
def test_masked_adamw_whole_tensor(backend, shape, dtype):
    case = Case(shape, 0, dtype)
    case.run()
    case.check(dtype)


def test_masked_adamw_nothing_selected(backend):
    param, empty = torch.randn(3, 4), torch.empty(0)
    before = param.clone()
    masked_adamw_([param], [torch.ones(3, 4)], [empty.int()], [empty], [empty], steps=[1], **HYPER)
    masked_adamw_([], [], [], [], [], steps=[], **HYPER)
    assert torch.equal(param, before)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selected", [True, False], ids=["selected", "dense"])
def test_masked_adamw_gradient_forms(backend, dtype, grad_dtype, selected):
    case = Case((9, 17), 80, dtype)
    case.grads = [grad.to(grad_dtype) for grad in case.grads]
    case.run(change_grad=case.selected if selected else lambda grad: grad)
    case.check(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 90], ids=["whole", "selected"])
def test_masked_adamw_masters(backend, dtype, k):
    """Masters take the update in full precision; parameters are their rounding, also in ties."""
    case = Case((10, 14), k, dtype, steps=20)
    master = case.selected(case.before).float()
    start = master.clone()
    case.run(masters=[master])
    truth, _ = oracle(start, [case.selected(g) for g in case.grads])
    assert_matches(master, truth, torch.float32, OPERATIONS * 20)
    assert torch.equal(case.selected(case.param), master.to(dtype))


@not_finite
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_adamw_rounds_to_nearest_even(backend, dtype):
    """Ties, subnormals, overflow, infinities and NaN: as torch rounds."""
    info = torch.finfo(dtype)
    grid = torch.tensor([1.0, 1.5, info.tiny, info.smallest_normal / 4, info.max, 3e4]).to(dtype)
    up = (grid.view(torch.int16) + 1).view(dtype)
    tie = ((grid.double() + up.double()) / 2).float()
    far = torch.tensor([0.0, -0.0, 1e38, -1e38, 1e-30, float("inf"), float("nan"), 65519.99])
    master = torch.cat([grid.float(), tie, -tie, far])
    master[master.isnan() & (torch.arange(len(master)) < len(master) - 2)] = 1.0
    param = torch.zeros(len(master), dtype=dtype)
    zero, index = torch.zeros(len(master)), torch.arange(len(master))
    masked_adamw_(
        [param], [zero], [index], [zero.clone()], [zero.clone()], steps=[1], masters=[master],
        **{**HYPER, "weight_decay": 0.0},
    )  # fmt: skip
    expected = master.to(dtype)
    assert torch.equal(param.isnan(), expected.isnan())
    assert torch.equal(param[~param.isnan()], expected[~param.isnan()])


def several_cases():
    cases = [
        Case((5, 9), 20), Case((33,), 0, torch.bfloat16), Case((4, 4), 16, torch.float16),
        Case((2, 3, 5), 1, torch.float32, torch.int32), Case((64, 3), 150, torch.bfloat16),
    ]  # fmt: skip
    firsts = [1, 1, 7, 1000, 3]
    for case, first in zip(cases, firsts, strict=True):
        case.m = torch.randn_like(case.m) * 1e-2
        case.v = torch.rand_like(case.v) * 1e-3
        case.first = first
    return cases


def run_together(cases, together=True, **options):
    groups = [cases] if together else [[case] for case in cases]
    for group in groups:
        masked_adamw_(
            [c.param for c in group], [c.grads[0] for c in group], [c.index for c in group],
            [c.m for c in group], [c.v for c in group], steps=[c.first for c in group],
            **{**HYPER, **options},
        )  # fmt: skip


def test_masked_adamw_several_tensors_are_independent(backend):
    """Different dtypes, index types and steps in one call give what single calls give."""
    torch.manual_seed(1)
    together = several_cases()
    torch.manual_seed(1)
    alone = several_cases()
    run_together(together)
    run_together(alone, together=False)
    for a, b in zip(together, alone, strict=True):
        for name in ("param", "m", "v"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    # and each with the bias correction of its own step
    case = Case((6,), 6)
    case.first = 50
    run_together([case], weight_decay=0.0)
    g = case.grads[0].double()
    m, v = 0.1 / (1 - 0.9**50) * g, 0.001 / (1 - 0.999**50) * g * g
    assert_matches(
        case.param, case.before.double() - 1e-2 * m / (v.sqrt() + 1e-8), terms=OPERATIONS
    )


@pytest.mark.parametrize("as_tensors", [True, False])
def test_masked_adamw_steps_and_lr_forms(backend, as_tensors):
    case, same = Case((40,), 9, steps=1), Case((40,), 9, steps=1)
    for name in ("param", "index", "grads"):
        setattr(same, name, getattr(case, name))
    same.param = case.param.clone()
    case.run()
    steps = [torch.tensor(1.0)] if as_tensors else torch.tensor([1])
    lr = torch.tensor(1e-2, dtype=torch.float64 if as_tensors else torch.float32)
    masked_adamw_(
        [same.param], same.grads, [same.index], [same.m], [same.v], **{**HYPER, "lr": lr},
        steps=steps,
    )  # fmt: skip
    assert_matches(same.param, case.param.double(), terms=OPERATIONS)


@pytest.mark.parametrize("k", [0, 50], ids=["whole", "selected"])
def test_masked_adamw_grad_scale(backend, k):
    case = Case((8, 9), k)
    case.run(change_grad=lambda grad: grad * 1000, grad_scale=torch.tensor(1000.0))
    case.check()


def test_masked_adamw_found_inf(backend):
    case = Case((8, 9), 20)
    case.run(found_inf=torch.tensor(1.0))
    assert torch.equal(case.param, case.before)
    assert not torch.stack([case.m, case.v]).any()
    case.run(found_inf=torch.tensor(0.0))
    case.check()


@pytest.mark.parametrize("k", [0, 40], ids=["whole", "selected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_adamw_strides(backend, dtype, k):
    """Transposed, dilated and channels-last parameters beside gradients of yet other strides."""
    index = some_indices(120, k)
    shape = (4, 5, 2, 3)
    layouts = [
        lambda x: x.reshape(3, 2, 5, 4).permute(3, 2, 1, 0),
        lambda x: x.repeat_interleave(2).view(4, 5, 2, 6)[..., ::2],
        lambda x: x.view(shape).contiguous(memory_format=torch.channels_last),
        lambda x: x.view(shape),
    ]
    for of_param in layouts:
        for of_grad in layouts:
            param = of_param(torch.randn(120).to(dtype))
            grad = of_grad(torch.randn(120).to(dtype))
            assert param.shape == grad.shape == shape
            dense = param.clone(memory_format=torch.contiguous_format)
            tensors = [state(index, param) for _ in range(4)]
            masked_adamw_([param], [grad], [index], [tensors[0]], [tensors[1]], steps=[1], **HYPER)
            masked_adamw_(
                [dense], [grad.contiguous()], [index], [tensors[2]], [tensors[3]], steps=[1],
                **HYPER,
            )  # fmt: skip
            assert torch.equal(param, dense)
            assert torch.equal(tensors[0], tensors[2])


def test_masked_adamw_expanded_gradient(backend):
    case, index = Case((6, 5), 11, steps=1), torch.arange(30)
    case.grads = [torch.tensor(0.5).expand(6, 5)]
    case.run()
    case.check()
    strided = Case((6, 5), 30, steps=1)
    strided.index, strided.grads = index, [torch.randn(60)[::2].view(6, 5)]
    strided.run(change_grad=lambda grad: grad.as_strided((30,), (2,)))
    strided.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_adamw_leaves_every_other_bit(backend, dtype):
    """NaN payloads, -0 and subnormals outside the mask stay, beside each and every entry."""
    bits = {
        torch.float32: [0x7FC12345, -0x80000000, 1, -1],
        torch.bfloat16: [0x7FC5, -0x8000, 1, -1],
        torch.float16: [0x7E15, -0x8000, 1, -1],
    }[dtype]
    sentinels = torch.tensor(bits * 100, dtype=BITS[dtype])
    index = torch.arange(1, 400, 3)
    param = sentinels.clone().view(dtype)
    param[index] = 1.0
    grad = torch.full((400,), float("nan"))
    grad[index] = 1.0
    m, v = torch.zeros(len(index)), torch.zeros(len(index))
    masked_adamw_([param], [grad], [index], [m], [v], steps=[1], **HYPER)
    inside = torch.zeros(400, dtype=torch.bool)
    inside[index] = True
    assert torch.equal(param.view(BITS[dtype])[~inside], sentinels[~inside])
    assert (param[inside] < 1).all()


@not_finite
@pytest.mark.parametrize("amsgrad", [False, True])
def test_masked_adamw_gradients_that_are_not_finite(backend, amsgrad):
    """NaN and infinity reach exactly the entries that they reach in torch."""
    case = Case((40,), 31, steps=3)
    for i, value in enumerate([float("nan"), float("inf"), -float("inf"), 1e15, 0.0]):
        case.grads[0][case.index[i]] = value
        case.grads[1][case.index[i + 7]] = value
    case.run(amsgrad=amsgrad)
    truth, moments = oracle(
        case.selected(case.before), [case.selected(g) for g in case.grads], amsgrad=amsgrad
    )
    assert torch.equal(case.selected(case.param).isnan(), truth.isnan())
    finite = truth.isfinite()
    assert_matches(case.selected(case.param)[finite], truth[finite], terms=3 * OPERATIONS)
    if amsgrad:
        assert torch.equal(case.v_max.isnan(), moments["max_exp_avg_sq"].isnan())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [[0, 12], [-1, 3], [5, 2], [50_000_000, 2], [3, 3]], ids=str)
def test_masked_adamw_refuses_an_index(backend, bad, index_dtype):
    params = [torch.ones(12), torch.ones(3, 4)]
    if params[0].is_cuda:
        pytest.skip("indices on a GPU are not read")
    indices = [torch.tensor([1, 2], dtype=index_dtype), torch.tensor(bad, dtype=index_dtype)]
    m, v = [torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"indices\[1\]"):
        masked_adamw_(params, [torch.ones(12), torch.ones(3, 4)], indices, m, v, steps=[1, 1],
                      **HYPER)  # fmt: skip
    assert all((param == 1).all() for param in params)
    assert not torch.stack(m + v).any()


@pytest.mark.parametrize("backend_name", ["reference", "native"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_masked_adamw_float64(backend_name, state_dtype):
    from fishkern._dispatch import use_backend, why_not

    if reason := why_not(backend_name):
        pytest.skip(f"{backend_name}: {reason}")
    case = Case((9, 8), 30, torch.float64, steps=10)
    case.m, case.v, case.v_max = (t.to(state_dtype) for t in (case.m, case.v, case.v_max))
    with use_backend(backend_name):
        case.run(amsgrad=True)
    truth, _ = oracle(
        case.selected(case.before), [case.selected(g) for g in case.grads], amsgrad=True
    )
    assert_matches(case.selected(case.param), truth, state_dtype, 10 * OPERATIONS)


ONE = torch.ones(4)
INDEX = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"grads": []}, ValueError, "grads has 0 entries, params 1"),
        ({"steps": [1, 2]}, ValueError, "steps has 2 entries"),
        ({"masters": [ONE, ONE]}, ValueError, "masters has 2 entries"),
        ({"max_exp_avg_sqs": [ONE, ONE]}, ValueError, "max_exp_avg_sqs has 2 entries"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] has shape"),
        ({"exp_avgs": [ONE]}, ValueError, r"exp_avgs\[0\] has 4 entries, selected are 2"),
        ({"exp_avg_sqs": [ONE]}, ValueError, r"exp_avg_sqs\[0\] has 4 entries"),
        ({"masters": [ONE]}, ValueError, r"masters\[0\] has 4 entries"),
        ({"max_exp_avg_sqs": [ONE]}, ValueError, r"max_exp_avg_sqs\[0\] has 4 entries"),
        ({"params": [ONE.int()]}, TypeError, r"params\[0\] has dtype torch.int32"),
        ({"indices": [INDEX.float()]}, TypeError, r"indices\[0\] has dtype torch.float32"),
        ({"exp_avgs": [ONE[:2].bfloat16()]}, TypeError, r"exp_avgs\[0\] has dtype"),
        ({"masters": [ONE[:2].half()]}, TypeError, r"masters\[0\] has dtype"),
    ],
)
def test_masked_adamw_refuses(changes, error, match):
    arguments = {
        "params": [torch.ones(4)], "grads": [ONE], "indices": [INDEX],
        "exp_avgs": [torch.zeros(2)], "exp_avg_sqs": [torch.zeros(2)], "steps": [1],
    }  # fmt: skip
    arguments |= changes
    with pytest.raises(error, match=match):
        masked_adamw_(**arguments, **HYPER)
    assert torch.equal(arguments["params"][0].float(), ONE)
