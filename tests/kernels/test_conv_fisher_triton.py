"""What is special to conv_fisher_ in Triton: its configurations, and addresses of 64 bits."""

import pytest
import torch

from fishkern import _dispatch
from fishkern.functional import conv_fisher_
from tests.kernels.test_conv_fisher import CASES, problem, truth
from tests.support.tolerances import assert_matches


@pytest.fixture
def triton_conv():
    conv = pytest.importorskip("fishkern.backends.triton.conv")
    if (reason := _dispatch.why_not("triton")) is not None:
        pytest.skip(f"triton: {reason}")
    return conv


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("blocks", [(16, 16, 16), (16, 64, 16), (32, 16, 32), (32, 32, 64)])
@pytest.mark.parametrize("name", ["odd", "groups", "3-D", "calls of groups"])
def test_conv_fisher_of_every_config(triton_conv, name, blocks, splits):
    case = CASES[name]
    x, grad_out = problem(case)
    mask = torch.rand(case.weight) < 0.5
    expected = truth(case, x, grad_out, mask)
    fisher = torch.ones(case.weight, device=DEVICE)
    scores = torch.ones(len(x), device=DEVICE)
    dims = len(case.kernel)
    geometry = {
        key: [value] * dims if isinstance(value, int) and key != "groups" else value
        for key, value in case.geometry.items()
    }
    triton_conv.conv_fisher_(
        fisher,
        x.to(DEVICE),
        grad_out.to(DEVICE),
        **geometry,
        sample_scores=scores,
        mask=mask.to(DEVICE),
        config=triton_conv.Config(*blocks, num_warps=4, num_stages=2),
        splits=splits,
    )
    assert_matches(fisher.cpu(), expected[0] + 1, terms=100)
    assert_matches(scores.cpu(), expected[2] + 1, terms=1000)


@pytest.mark.parametrize("name", ["odd", "padding wider than the input", "calls", "3-D"])
def test_conv_fisher_of_addresses_of_64_bits(triton_conv, monkeypatch, name):
    monkeypatch.setattr(triton_conv, "_index_type", lambda *tensors: triton_conv.tl.int64)
    x, grad_out = problem(CASES[name])
    fisher = torch.zeros(CASES[name].weight, device=DEVICE)
    with _dispatch.use_backend("triton"):
        conv_fisher_(fisher, x.to(DEVICE), grad_out.to(DEVICE), **CASES[name].geometry)
    assert_matches(fisher.cpu(), truth(CASES[name], x, grad_out)[0], terms=100)


def test_conv_fisher_chooses_addresses_by_the_distances_inside_a_sample(triton_conv):
    def index_type(*shape):
        operand = torch.empty(shape, device="meta")
        return triton_conv._index_type(operand, operand[:, :, :1], None)

    assert index_type(64, 1, 64, 1, 512, 512) == triton_conv.tl.int32
    assert index_type(2, 1, 64, 512, 512, 512) == triton_conv.tl.int64
