"""Pitfalls of the sums: what is added up before the square, in which dtype, how often."""

import pytest
import torch
from torch import nn

from fishkern import FisherVerificationError
from fishkern.functional import linear_fisher_
from fishkern.scoring import passes as scoring
from tests.support.oracle import fisher_oracle, squared_error
from tests.support.pitfalls import (
    I,
    O,
    T,
    assert_same,
    assert_sums_to_the_gradient,
    batch,
    exact,
    network,
    score,
)
from tests.support.problems import (
    PROBLEMS,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def test_pitfall_01_square_after_the_sum_over_samples(backend):
    model, (x, y) = network(), batch()
    scores = score(model, (x, y))
    assert_same(score(model, (x.repeat(3, 1, 1), y.repeat(3, 1, 1))), scores)
    # two samples with opposite gradients: no gradient but rounding, and information
    layer = nn.Linear(I, O, bias=False)
    x = torch.randn(1, I)
    y = layer(x).detach()
    data = x.repeat(2, 1), torch.cat([y + 1, y - 1])
    assert_matches(score(layer, data)["weight"], x.double().square().expand(O, I))
    squared_error(layer, data).sum().backward()
    assert layer.weight.grad.abs().max() < 1e-6


def test_pitfall_01_more_samples_than_run_at_once(backend):
    x, grad_out = torch.randn(600, 2, 1), torch.randn(600, 2, 1)
    fisher = torch.zeros(1, 1)
    linear_fisher_(fisher, x, grad_out)
    assert_matches(fisher, (x * grad_out).double().sum(1).square().sum(0)[None], terms=1200)


def test_pitfall_02_square_before_the_sum_over_tokens(backend):
    model, (x, y) = network(), batch(1)
    scores = score(model, (x, y))
    squared_error(model, (x, y)).backward()
    assert_same(scores, {name: p.grad.square() for name, p in model.named_parameters()})
    # two tokens with opposite gradients: nothing but rounding
    layer = nn.Linear(I, O)
    x = torch.ones(1, 2, I)
    y = layer(x).detach() + torch.tensor([1.0, -1.0])[None, :, None]
    assert all(s.abs().max() < 1e-10 for s in score(layer, (x, y)).values())


@pytest.mark.parametrize("reduce", [torch.mean, lambda losses: losses.sum() * 3], ids=["mean", "3"])
def test_pitfall_03_losses_reduced_by_the_caller(reduce):
    def loss_fn(model, batch):
        losses = squared_error(model, batch)
        return reduce(losses).expand(len(losses))

    with pytest.raises(FisherVerificationError, match="not a loss per sample"):
        score(network(), batch(), loss_fn=loss_fn, verify=2)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pitfall_03_the_split_into_batches_does_not_matter(parts):
    model, (x, y) = network(), batch()
    pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    scores = exact(model, [(x, y)])
    assert_same(score(model, *pieces), scores)
    assert_same(score(model, *pieces, *pieces), scores)


@pytest.mark.parametrize("scale", [1 / 3, 1024.0])
def test_pitfall_03_scaled_losses_scale_by_the_square(scale):
    model, data = network(), batch()
    scaled = score(model, data, loss_fn=lambda *a: scale * squared_error(*a))
    assert_same({name: s / scale**2 for name, s in scaled.items()}, score(model, data))


def test_pitfall_03_a_sample_is_the_sum_of_its_tokens():
    problem = PROBLEMS["bert-tokens"]  # with unequal numbers of labels
    exact(problem.model(), [problem.batch()], problem.loss)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e6])
def test_pitfall_04_range_and_dtype_of_the_accumulator(scale):
    model, data = network(), batch()
    scaled = score(model, data, loss_fn=lambda *a: scale * squared_error(*a))
    assert {s.dtype for s in scaled.values()} == {torch.float32}
    assert_same({n: s / scale**2 for n, s in scaled.items()}, score(model, data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pitfall_04_many_samples_in_a_narrow_dtype(backend, dtype):
    layer = nn.Linear(1, 1).to(dtype)
    for param in layer.parameters():
        param.data.zero_()
    ones = torch.ones(701, 1, dtype=dtype)  # a bfloat16 accumulator stops at 256
    for params in ("*", "bias"):
        assert {s.item() for s in score(layer, (ones, ones), params=params).values()} == {1.0}


def test_pitfall_04_no_square_of_a_small_gradient_is_lost(backend):
    x, grad_out = (torch.rand(2, T, size).add(0.5).half() for size in (I, O))
    fisher, bias = torch.zeros(O, I), torch.zeros(O)
    grad_out *= 1e-4  # squares of 1e-8: below all that float16 has
    linear_fisher_(fisher, x, grad_out, bias_fisher=bias)
    per_sample = torch.einsum("nto,nti->noi", grad_out.double(), x.double())
    assert_matches(fisher, per_sample.square().sum(0), terms=2 * T)
    assert_matches(bias, grad_out.double().sum(1).square().sum(0), terms=2 * T)
    assert fisher.count_nonzero() == fisher.numel()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(I, I), nn.LayerNorm(I), nn.Linear(I, O)

    def forward(self, x):
        for _ in range(3):
            x = x + self.norm(self.layer(x)).tanh()
        return self.last(x)


def test_pitfall_05_a_parameter_with_several_uses(monkeypatch):
    # in front of a norm a bias's gradient is a small rest of large terms, in any float32
    exact(Shared(), [batch(), batch(2, 7)], dtype=torch.float32)
    assert_sums_to_the_gradient(monkeypatch, Shared(), batch())


def test_pitfall_05_uses_that_cancel():
    layer, (x, y) = nn.Linear(I, O), batch()
    scores = score(layer, (x, y), loss_fn=lambda m, b: (m(b[0]) - m(-b[0])).flatten(1).sum(1))
    assert not scores["bias"].count_nonzero()
    assert_matches(scores["weight"], (2 * x.double().sum(1)).square().mean(0).expand(O, I), terms=T)


@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 3, 33, 17), (1, 65, 1, 1), (5, 17, 129, 3)])
def test_pitfall_14_odd_shapes_in_whole_numbers(shape, backend):
    n, t, i, o = shape
    layer = nn.Linear(i, o)
    for tensor in (layer.weight.data, layer.bias.data):
        tensor.random_(-2, 3)
    x, y = torch.randint(-2, 3, (n, t, i)).float(), torch.randint(-2, 3, (n, t, o)).float()
    scores = score(layer, (x, y))
    error = (layer(x) - y).detach().double()
    grad = torch.einsum("nto,nti->noi", error, x.double())
    assert torch.equal(scores["weight"], (grad.square().sum(0) / n).float())
    assert torch.equal(scores["bias"], (error.sum(1).square().sum(0) / n).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfall_14_nothing_outside_the_operands_is_read(backend, dtype):
    def surrounded(*shape):
        """A view, with NaN wherever a block that is larger than the operand could reach."""
        around = torch.full([size + 128 for size in shape], torch.nan, dtype=dtype)
        return around[tuple(slice(0, size) for size in shape)].copy_(torch.randn(shape))

    x, grad_out = surrounded(2, 5, 3), surrounded(2, 5, 7)
    fisher, bias = torch.zeros(7, 3), torch.zeros(7)
    linear_fisher_(fisher, x, grad_out, bias_fisher=bias)
    per_sample = torch.einsum("nto,nti->noi", grad_out.double(), x.double())
    assert_matches(fisher, per_sample.square().sum(0), terms=10)
    assert_matches(bias, grad_out.double().sum(1).square().sum(0), terms=10)


def test_pitfall_14_float32_is_multiplied_in_full(backend):
    fisher = torch.zeros(1, 1)
    x = torch.tensor([[[128 + 2**-4]], [[-1.0]]])  # one bit more than TF32 and float16 have
    linear_fisher_(fisher, x, torch.ones(2, 1, 1))
    linear_fisher_(fisher, x.expand(2, 2, 1), torch.ones(2, 2, 1))
    assert_matches(fisher, 5 * x.double().square().sum(0))


@pytest.mark.parametrize("samples", [1, 3])
def test_pitfall_18_the_first_call_equals_the_second(backend, samples):
    model, data = nn.Linear(19, 23), batch(samples, 11, 19, 23)  # shapes that no other test uses
    first = score(model, data)
    assert first == score(model, data)


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pitfall_20_every_route_gives_the_same(backend, samples, tokens, monkeypatch):
    model = nn.Sequential(nn.Embedding(6, I), nn.Linear(I, 4), nn.LayerNorm(4), nn.Linear(4, O))
    data = torch.randint(6, (samples, tokens)), torch.randn(samples, tokens, O)
    fused = exact(model, [data], dtype=torch.float32)
    monkeypatch.setattr(scoring, "rule_for", lambda module: None)
    monkeypatch.setattr(scoring.Scoring, "_find_elementwise", lambda scoring: [])
    other = score(model, data)
    assert "fused" in fused.routes.values()
    assert "fused" not in other.routes.values()
    truth = fisher_oracle(model, [data], lambda *a: squared_error(*a).sum(), list(other))
    rounded = fisher_oracle(
        model, [data], lambda *a: squared_error(*a).sum(), list(other), torch.float32
    )
    assert_scores_match(other, truth, rounded)
