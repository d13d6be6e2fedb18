"""The ops inside ``torch.compile(fullgraph=True)``: same values, dynamic shapes, late choice."""

import pytest
import torch

import fishkern
from fishkern import functional
from tests.support import op_inputs

FULLGRAPH = {"fullgraph": True, "dynamic": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return [clone(item) for item in value]
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return value


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor loads it
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("op", "i"), op_inputs.CASES)
def test_compiled_op_equals_eager(op, i, compiler):
    args, kwargs = op_inputs.case(op, i)
    eager, compiled = (clone(args), clone(kwargs)), (clone(args), clone(kwargs))
    function = getattr(torch.ops.fishkern, op)
    expected = function(*eager[0], **eager[1])
    actual = torch.compile(lambda a, k: function(*a, **k), backend=compiler, **FULLGRAPH)(*compiled)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def fisher_of(x, grad_out):
    fisher = x.new_zeros(grad_out.shape[-1], x.shape[-1])
    bias_fisher, scores = x.new_zeros(grad_out.shape[-1]), x.new_zeros(x.shape[0])
    functional.linear_fisher_(
        fisher, x * 2, grad_out, bias_fisher=bias_fisher, sample_scores=scores
    )
    return fisher + 1, bias_fisher, scores


def top(scores, k):
    return [2 * indices for indices in functional.topk_indices([scores, scores + 1], k)]


def step_of(param, grad, indices):
    moments = [torch.zeros_like(indices, dtype=torch.float32) for _ in range(2)]
    functional.masked_adamw_(
        [param], [grad], [indices], moments[:1], moments[1:], steps=[1], lr=0.1,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    return param * 1, moments[0]


def quantized_step_of(param, grad, indices):
    moments = [torch.zeros_like(indices, dtype=torch.uint8) for _ in range(2)]
    scales = [indices.new_zeros(-(-indices.numel() // 32), dtype=torch.uint8) for _ in range(2)]
    functional.masked_adamw_quantized_(
        [param], [grad], [indices], moments[:1], moments[1:], steps=[1], lr=0.1,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, exp_avg_scales=scales[:1],
        exp_avg_sq_scales=scales[1:],
    )  # fmt: skip
    return param * 1, functional.dequantize_moment(moments[0], scales[0], signed=True)


def shapes(function):
    """Arguments in two sizes."""
    if function is fisher_of:
        return [(torch.randn(n, 3, 5), torch.randn(n, 3, 4)) for n in (6, 9)]
    if function is top:
        return [(torch.randn(n), n // 2) for n in (10, 16)]
    sizes = (30, 60) if function is quantized_step_of else (3, 6)
    return [(torch.randn(n, 4), torch.randn(n, 4), torch.arange(2, 3 * n)) for n in sizes]


@pytest.mark.parametrize("function", [fisher_of, top, step_of, quantized_step_of])
def test_public_function_compiles_once_for_all_sizes(function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, **FULLGRAPH)
    for args in shapes(function):
        expected, actual = function(*clone(args)), compiled(*clone(args))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert counter.frame_count == 1


def test_backend_is_chosen_when_a_compiled_graph_runs():
    compiled = torch.compile(top, backend="aot_eager", **FULLGRAPH)
    args = (torch.randn(10), 5)
    expected = compiled(*args)
    with fishkern.use_backend("reference"):
        assert all(map(torch.equal, compiled(*args), expected))
    with (
        fishkern.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' was asked for"),
    ):
        compiled(*args)
