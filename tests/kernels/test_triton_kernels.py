"""What is special to the Triton kernels; their semantics are tested with every backend's."""

import math

import pytest
import torch

from fishkern import _dispatch
from fishkern.backends import reference
from tests.support.tolerances import assert_matches

linear = pytest.importorskip("fishkern.backends.triton.linear")
norm = pytest.importorskip("fishkern.backends.triton.norm")
adamw = pytest.importorskip("fishkern.backends.triton.adamw")
launch = pytest.importorskip("fishkern.backends.triton.launch")
Config = linear.Config

reason = _dispatch.available()["triton"]
pytestmark = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# One config per kind of tile: square, narrow on either side, one loop step and several.
CONFIGS = [
    Config(16, 16, 16, 4, 2),
    Config(16, 64, 16, 4, 3),
    Config(64, 16, 32, 4, 3),
    Config(32, 32, 64, 4, 1),
]
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 9), (4, 17, 33, 20), (5, 70, 16, 65), (2, 16, 64, 64)]


def problem(n, t, i, o, dtype=torch.float32):
    x = torch.randn(n, t, i, device=DEVICE).to(dtype)
    grad_out = torch.randn(n, t, o, device=DEVICE).to(dtype)
    return x, grad_out


def fisher_truth(x, grad_out, mask=None):
    n, o, i = x.shape[0], grad_out.shape[-1], x.shape[-1]
    sizes = {"fisher": (o, i), "bias_fisher": (o,), "sample_scores": (n,)}
    truth = {k: torch.zeros(s, dtype=torch.float64, device=x.device) for k, s in sizes.items()}
    reference.linear_fisher_(x=x.double(), grad_out=grad_out.double(), mask=mask, **truth)
    return truth


def fisher_result(x, grad_out, mask=None, scores=True, **forced):
    n, o, i = x.shape[0], grad_out.shape[-1], x.shape[-1]
    sizes = {"fisher": (o, i), "bias_fisher": (o,), "sample_scores": (n,)}
    if not scores:
        del sizes["sample_scores"]
    result = {k: torch.zeros(s, device=x.device) for k, s in sizes.items()}
    linear.linear_fisher_(x=x, grad_out=grad_out, mask=mask, **result, **forced)
    return result


def assert_fisher(result, truth, terms):
    for name, value in result.items():
        assert_matches(value, truth[name], terms=terms)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_o}x{c.block_i}x{c.block_t}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_fisher_every_config_at_every_shape(config, shape):
    x, grad_out = problem(*shape)
    mask = torch.rand(shape[3], shape[2], device=DEVICE) < 0.5
    for splits in (1, 2):
        result = fisher_result(x, grad_out, mask, config=config, splits=splits)
        assert_fisher(result, fisher_truth(x, grad_out, mask), terms=shape[1])


@pytest.mark.parametrize("square_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_fisher_one_token_by_both_routes(square_first, dtype):
    x, grad_out = problem(37, 1, 33, 20, dtype)
    result = fisher_result(x, grad_out, scores=False, square_first=square_first)
    assert_fisher(result, fisher_truth(x, grad_out), terms=37)


@pytest.mark.parametrize("tokens", [2, 1])
def test_linear_fisher_square_first_is_refused_where_it_is_wrong(tokens):
    x, grad_out = problem(3, tokens, 4, 4)
    with pytest.raises(ValueError, match="square_first needs one token"):
        fisher_result(x, grad_out, scores=tokens == 1, square_first=True)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_linear_fisher_mixed_dtypes_are_widened(dtypes):
    x, grad_out = problem(3, 20, 17, 19)
    x, grad_out = x.to(dtypes[0]), grad_out.to(dtypes[1])
    assert_fisher(fisher_result(x, grad_out), fisher_truth(x, grad_out), terms=20)


@pytest.mark.parametrize("shape", [(7, 40, 20, 33), (50, 2, 3, 5)], ids=str)
def test_linear_fisher_splits_agree_and_are_deterministic(shape):
    x, grad_out = problem(*shape)
    truth = fisher_truth(x, grad_out)
    for splits in (1, 3, shape[0]):
        first = fisher_result(x, grad_out, splits=splits)
        again = fisher_result(x, grad_out, splits=splits)
        assert_fisher(first, truth, terms=shape[1] * shape[0])
        for name in first:
            assert torch.equal(first[name], again[name])


def test_linear_fisher_integers_are_exact():
    x = torch.randint(-3, 4, (5, 19, 23), device=DEVICE).float()
    grad_out = torch.randint(-3, 4, (5, 19, 18), device=DEVICE).float()
    truth = fisher_truth(x, grad_out)
    for splits in (1, 2):
        for name, value in fisher_result(x, grad_out, splits=splits).items():
            assert torch.equal(value.double(), truth[name])


def inside_poison(tensor, last_dim_first=False):
    """The same values as a view in the middle of NaN, with odd strides."""
    order = list(range(tensor.dim()))
    order = [order[-1], *order[:-1]] if last_dim_first else order
    source = tensor.permute(order)
    room = source.new_full([2 * s + 3 for s in source.shape], math.nan)
    view = room[tuple(slice(2, 2 + 2 * s, 2) for s in source.shape)]
    view.copy_(source)
    return view.permute([order.index(d) for d in range(tensor.dim())]), room


@pytest.mark.parametrize("last_dim_first", [False, True])
@pytest.mark.parametrize("tokens", [1, 21])
def test_linear_fisher_reads_and_writes_nothing_beside_its_views(last_dim_first, tokens):
    plain = problem(3, tokens, 19, 35)
    x, grad_out = (inside_poison(t, last_dim_first)[0] for t in plain)
    sizes = {"fisher": (35, 19), "bias_fisher": (35,), "sample_scores": (3,)}
    if tokens == 1:
        del sizes["sample_scores"]  # so that the squares-first route runs
    for splits in (1, 2):
        views = {k: inside_poison(torch.zeros(s, device=DEVICE)) for k, s in sizes.items()}
        result = {name: view for name, (view, _) in views.items()}
        linear.linear_fisher_(x=x, grad_out=grad_out, splits=splits, **result)
        assert_fisher(result, fisher_truth(*plain), terms=tokens * 3)
        for view, room in views.values():
            assert int((~room.isnan()).sum()) == view.numel()


def test_linear_fisher_masked_nan_stays_out_of_the_scores():
    x, grad_out = problem(2, 3, 5, 7)
    x[0, 1, 4] = math.nan
    mask = torch.ones(7, 5, dtype=torch.bool, device=DEVICE)
    mask[:, 4] = False
    assert fisher_result(x, grad_out, mask)["sample_scores"].isfinite().all()


def test_linear_fisher_bias_without_inputs():
    x, grad_out = problem(3, 4, 0, 6)
    result = fisher_result(x, grad_out)
    assert_matches(result["bias_fisher"], grad_out.double().sum(1).square().sum(0), terms=4)


def test_linear_fisher_refuses_float64():
    x, grad_out = problem(1, 1, 2, 2)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        linear.linear_fisher_(torch.zeros(2, 2, device=DEVICE), x.double(), grad_out)
    with pytest.raises(TypeError, match="accumulates in float32"):
        linear.linear_fisher_(torch.zeros(2, 2, device=DEVICE).double(), x, grad_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size_o", "size_i"), [(1, 1), (2, 384), (8, 4096), (4096, 64), (4096, 4096), (50257, 768)]
)
@pytest.mark.parametrize("regular", [True, False])
def test_choose_config_fits_the_hardware(dtype, size_o, size_i, regular):
    for tokens in (1, 20, 2048):
        for scores in (False, True):
            config = linear.choose_config(
                size_o, size_i, tokens, dtype, scores=scores, regular=regular
            )
            blocks = config.block_o, config.block_i, config.block_t
            assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
            operands = (config.block_o + config.block_i) * config.block_t * dtype.itemsize
            assert operands * config.num_stages <= 99 * 1024


def test_choose_splits_fills_the_device_with_whole_samples():
    config = Config(16, 128, 64, 4, 3)
    device = torch.device("cpu")  # counts as 132 multiprocessors
    assert linear.choose_splits(1000, 32, config, device) == 1
    assert linear.choose_splits(32, 3, config, device) == 3
    assert linear.choose_splits(32, 64, config, device) == 16


# ---- masked_adamw_ ----


@pytest.mark.parametrize("splits", [1, 3, 7])
def test_norm_fisher_splits_agree_and_are_deterministic(splits):
    x_hat, grad_out = (torch.randn(7, 19, 70, device=DEVICE) for _ in range(2))
    truth, first, again = (
        [torch.zeros(n, device=DEVICE, dtype=dtype) for n in (70, 70, 7)]
        for dtype in (torch.float64, torch.float32, torch.float32)
    )
    reference.norm_fisher_(*truth[:2], x_hat, grad_out, sample_scores=truth[2])
    for result in (first, again):
        norm.norm_fisher_(*result[:2], x_hat, grad_out, sample_scores=result[2], splits=splits)
    for one, other, expected in zip(first, again, truth, strict=True):
        assert_matches(one, expected, terms=7 * 19)
        assert torch.equal(one, other)


def adamw_lists(sizes, param_dtype, grad_dtype, index_dtype, *, selected, masters, amsgrad):
    """Lists for the op; an index dtype of None selects everything."""
    params = [torch.randn(s, device=DEVICE).to(param_dtype) for s in sizes]
    whole = index_dtype is None
    indices = []
    for p in params:
        chosen = (torch.rand(p.numel(), device=DEVICE) < 0.3).nonzero().view(-1)
        indices.append(chosen[:0] if whole else chosen.to(index_dtype))
    counts = [p.numel() if whole else len(i) for p, i in zip(params, indices, strict=True)]
    lists = {
        "params": params,
        "grads": [
            torch.randn(k if selected else p.shape, device=DEVICE).to(grad_dtype)
            for p, k in zip(params, counts, strict=True)
        ],
        "indices": indices,
    }
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters"):
        lists[name] = [torch.rand(k, device=DEVICE) for k in counts]
    lists["masters"] = [
        (p.view(-1) if whole else p.view(-1)[i.long()]).float() + 1e-5
        for p, i in zip(params, indices, strict=True)
    ]
    lists["masters"] = lists["masters"] if masters else []
    lists["max_exp_avg_sqs"] = lists["max_exp_avg_sqs"] if amsgrad else []
    return lists


def in_double(lists):
    return {
        name: [t.double() if t.is_floating_point() else t for t in tensors]
        for name, tensors in lists.items()
    }


def scalars(steps, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1):
    return {
        "steps": torch.tensor(steps, dtype=torch.float32),
        "lr": torch.tensor(lr, dtype=torch.float64),
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
    }


KINDS = {
    "plain": (torch.float32, torch.float32, torch.int32, False, False, False),
    "int64": (torch.float32, torch.float32, torch.int64, False, False, True),
    "selected": (torch.float32, torch.bfloat16, torch.int32, True, False, False),
    "whole": (torch.float32, torch.float32, None, False, False, True),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.int32, False, False, False),
    "bf16-masters": (torch.bfloat16, torch.float32, torch.int32, True, True, False),
    "fp16-masters": (torch.float16, torch.float16, torch.int64, False, True, True),
    "fp16-whole": (torch.float16, torch.float32, None, False, True, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_masked_adamw_every_kind(kind, scaled):
    *dtypes, selected, masters, amsgrad = KINDS[kind]
    lists = adamw_lists(
        [(3, 5), (41, 53), (1,)], *dtypes, selected=selected, masters=masters, amsgrad=amsgrad
    )
    truth = in_double(lists)
    before = [p.clone() for p in lists["params"]]
    options = {"maximize": scaled, **scalars([1, 2, 1000])}
    if scaled:
        options["grad_scale"] = torch.tensor(8.0, device=DEVICE)
        options["found_inf"] = torch.tensor(0.0, device=DEVICE)
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "params"):
        dtype = dtypes[0] if name == "params" else torch.float32
        for actual, expected in zip(lists[name], truth[name], strict=True):
            assert_matches(actual, expected, dtype, terms=4)
    for old, new, index in zip(before, lists["params"], lists["indices"], strict=True):
        if dtypes[2] is not None:
            keep = torch.ones(old.numel(), dtype=torch.bool, device=DEVICE)
            keep[index.long()] = False
            assert torch.equal(old.view(-1)[keep], new.view(-1)[keep])


def test_masked_adamw_mixed_kinds_take_one_launch_each():
    kinds = [KINDS[k] for k in ("plain", "selected", "whole", "bf16", "plain")]
    parts = []
    for *dtypes, selected, _, _ in kinds:
        parts.append(
            adamw_lists([(7, 9)], *dtypes, selected=selected, masters=False, amsgrad=False)
        )
    lists = {name: [t for part in parts for t in part[name]] for name in parts[0]}
    truth, options = in_double(lists), scalars([1, 2, 3, 4, 5])
    with launch.collect() as launches:
        adamw.masked_adamw_(**lists, **options)
    assert len(launches) == 4
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for actual, expected in zip(lists["params"], truth["params"], strict=True):
        assert_matches(actual, expected, actual.dtype)


def test_masked_adamw_long_tensors_take_several_blocks(monkeypatch):
    monkeypatch.setattr(adamw, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(adamw, "num_multiprocessors", lambda device: 2)
    lists = adamw_lists(
        [(15000,), (10,)], *KINDS["plain"][:3], selected=False, masters=False, amsgrad=False
    )
    truth, options = in_double(lists), scalars([1, 1])
    with launch.collect() as launches:
        adamw.masked_adamw_(**lists, **options)
    assert launches[0].grid == (len(launches[0].args["programs_ptr"][0]),)
    adamw.masked_adamw_(**lists, **options)
    reference.masked_adamw_(**truth, **options)
    for actual, expected in zip(lists["params"], truth["params"], strict=True):
        assert_matches(actual, expected)


def test_masked_adamw_tables_share_entries_out(monkeypatch):
    monkeypatch.setattr(adamw, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(adamw, "num_multiprocessors", lambda device: 2)
    rows = ((*range(1, 8), 5000, 0), (*range(11, 18), 10, 1))
    tables = adamw._build_tables(torch.device("cpu"), rows)
    assert tables.entries_per_program == 2048
    assert tables.programs.tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]
    assert tables.table.T.tolist() == [list(row) for row in rows]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_masked_adamw_bias_correction_over_a_hundred_thousand_steps(beta):
    steps = [float(s) for s in (1, 2, 3, 10, 77, 500, 1000, 9999, 10**5)]
    n = len(steps)
    ones = [torch.ones(1, device=DEVICE) for _ in range(4 * n)]
    lists = {
        "params": [torch.zeros(1, device=DEVICE) for _ in range(n)],
        "grads": ones[:n],
        "indices": [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(n)],
        "exp_avgs": ones[n : 2 * n],
        "exp_avg_sqs": ones[2 * n : 3 * n],
        "max_exp_avg_sqs": [],
        "masters": [],
    }
    # With every moment at 1 the update is lr sqrt(1 - beta2^s) / (1 - beta1^s).
    adamw.masked_adamw_(
        **lists, **scalars(steps, lr=1.0, beta1=beta, beta2=0.999, eps=0.0, weight_decay=0.0)
    )
    for step, param in zip(steps, lists["params"], strict=True):
        update = math.sqrt(1 - 0.999**step) / -math.expm1(step * math.log(beta) if beta else -1e9)
        assert_matches(param, torch.full((1,), -update, dtype=torch.float64, device=DEVICE))


def test_masked_adamw_rounds_to_nearest_even():
    # masters stay as they are (no gradient, no decay); params get their rounding
    masters = torch.randn(4096, device=DEVICE) * torch.logspace(-38, 38, 4096, device=DEVICE)
    ties = torch.arange(-2048, 2048, device=DEVICE, dtype=torch.int32)
    ties = (0x3F800000 + ties * 0x8000).view(torch.float32)  # halfway between two bfloat16
    masters = torch.cat([masters, ties, masters.new_tensor([math.nan, math.inf, 3.4e38, 1e-40])])
    param = torch.zeros(len(masters), dtype=torch.bfloat16, device=DEVICE)
    zeros = torch.zeros_like(masters)
    adamw.masked_adamw_(
        params=[param],
        grads=[zeros],
        indices=[torch.arange(len(masters), device=DEVICE)],
        exp_avgs=[zeros.clone()],
        exp_avg_sqs=[zeros.clone()],
        max_exp_avg_sqs=[],
        masters=[masters.clone()],
        **scalars([1], weight_decay=0.0),
    )
    expected = masters.to(torch.bfloat16)
    assert torch.equal(param.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_masked_adamw_found_inf_changes_nothing():
    lists = adamw_lists(
        [(41, 53)], *KINDS["fp16-masters"][:3], selected=False, masters=True, amsgrad=True
    )
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    found_inf = torch.tensor([1.0], device=DEVICE)
    adamw.masked_adamw_(**lists, **scalars([3]), found_inf=found_inf)
    for name, tensors in lists.items():
        assert all(map(torch.equal, tensors, before[name]))


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_masked_adamw_params_and_grads_of_any_strides(layout):
    lists = adamw_lists(
        [(37, 41)], *KINDS["plain"][:3], selected=False, masters=False, amsgrad=False
    )
    truth = in_double(lists)
    room = torch.full((41, 37) if layout == "transposed" else (37, 90), 5.0, device=DEVICE)
    view = room.T if layout == "transposed" else room[:, 3:85:2]
    view.copy_(lists["params"][0])
    lists["params"] = [view]
    lists["grads"] = [lists["grads"][0].T.contiguous().T]
    adamw.masked_adamw_(**lists, **scalars([1]))
    reference.masked_adamw_(**truth, **scalars([1]))
    assert_matches(view, truth["params"][0])
    if layout == "sliced":
        assert int((room == 5.0).sum()) == room.numel() - view.numel()


def test_masked_adamw_refuses_what_the_kernel_does_not_have():
    lists = adamw_lists([(8,)], *KINDS["whole"][:3], selected=False, masters=False, amsgrad=False)
    with pytest.raises(TypeError, match=r"params has a tensor of dtype torch\.float64"):
        adamw.masked_adamw_(**{**lists, "params": [lists["params"][0].double()]}, **scalars([1]))
    with pytest.raises(TypeError, match=r"exp_avgs has a tensor of dtype torch\.bfloat16"):
        adamw.masked_adamw_(
            **{**lists, "exp_avgs": [lists["exp_avgs"][0].bfloat16()]}, **scalars([1])
        )
    with pytest.raises(ValueError, match="exp_avg_sqs has a tensor that is not contiguous"):
        adamw.masked_adamw_(
            **{**lists, "exp_avg_sqs": [torch.zeros(16, device=DEVICE)[::2]]}, **scalars([1])
        )
