"""What is special to the Triton kernels of linear and norm; the rest is tested on every backend."""

import math

import pytest
import torch

from fishkern import _dispatch
from fishkern.backends import reference
from tests.support.tolerances import assert_matches

linear = pytest.importorskip("fishkern.backends.triton.linear")
norm = pytest.importorskip("fishkern.backends.triton.norm")
launch = pytest.importorskip("fishkern.backends.triton.launch")
Config = linear.Config

reason = _dispatch.why_not("triton")
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
