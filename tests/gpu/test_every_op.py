"""Every op on the device as the reference computes it on the CPU: small, for memory checkers."""

import pytest
import torch

import fishkern
from fishkern import _dispatch
from tests.support import op_inputs
from tests.support.tolerances import assert_matches

pytestmark = pytest.mark.gpu
TERMS = 100


def moved(value, device):
    """A copy of an op's argument, whatever it holds, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


def tensors(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(*value)


def assert_as_the_reference(name, args, kwargs, device):
    """Outputs and arguments: ops write into some of these."""
    op = getattr(torch.ops.fishkern, name)
    backend = "triton" if hasattr(_dispatch.backend("triton")[0], name) else "reference"
    results = []
    for where, used in (("cpu", "reference"), (device, backend)):
        own_args = moved(args, where)
        own_kwargs = {key: moved(value, where) for key, value in kwargs.items()}
        with fishkern.use_backend(used):
            output = op(*own_args, **own_kwargs)
        results.append(list(tensors(output, own_args, *own_kwargs.values())))
    for expected, found in zip(*results, strict=True):
        assert found.device.type == device.type
        if expected.is_floating_point():
            assert_matches(found.cpu(), expected.double(), expected.dtype, terms=TERMS)
        else:
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("op", "i"), op_inputs.CASES)
def test_every_op(device, op, i):
    assert_as_the_reference(op, *op_inputs.case(op, i), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["linear_fisher_", "linear_selected_grad_"])
def test_more_than_a_tile(device, op, dtype):
    """Odd sizes, so that tiles end beyond the tensors."""
    x, grad_out = torch.randn(3, 19, 137).to(dtype), torch.randn(3, 19, 71).to(dtype)
    if op == "linear_fisher_":
        args = torch.zeros(71, 137), x, grad_out
    else:
        indices = (torch.rand(71 * 137) < 0.1).nonzero()[:, 0].int()
        args = torch.zeros(len(indices)), x, grad_out, indices
    assert_as_the_reference(op, args, {}, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("selected", [True, False], ids=["selected_grad", "dense_grad"])
def test_more_than_a_block(device, selected, dtype):
    """Of entries, whose last block is not whole."""
    index = torch.arange(5, 9000, 7)
    grad = torch.randn(len(index) if selected else 9000).to(dtype)
    state = [[torch.zeros(len(index))], [torch.zeros(len(index))], [], []]
    rates = torch.ones(1), torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1
    args = [torch.randn(9000).to(dtype)], [grad], [index], *state, *rates
    assert_as_the_reference("masked_adamw_", args, {}, device)
