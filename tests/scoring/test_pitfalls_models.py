"""Pitfalls of models: uses past their modules, modes, samples that lie elsewhere, state."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import estimate_fisher
from fishkern.functional import linear_fisher_
from tests.support import pitfalls
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.pitfalls import (
    I,
    N,
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
    SAMPLES,
    TOKENS,
    bert,
    classes,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(I, I), nn.Linear(I, O)

    def forward(self, x):
        return self.last(self.layer(x)) + self.layer.weight[:O, 0] + self.last.weight.norm()


def test_pitfall_06_a_use_that_no_rule_sees(monkeypatch):
    scores = exact(Outside(), [batch()])
    assert "fused" not in {scores.routes[f"{name}.weight"] for name in ("layer", "last")}
    assert_sums_to_the_gradient(monkeypatch, Outside(), batch())


@pytest.mark.parametrize("make", [
    lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
], ids=["attention", "encoder"])  # fmt: skip
def test_pitfall_06_modules_that_read_the_weights_of_their_parts(make):
    def loss_fn(model, batch):
        attention = isinstance(model, nn.MultiheadAttention)
        y = model(*[batch[0]] * 3)[0] if attention else model(batch[0])
        return (y - batch[1]).square().flatten(1).sum(1)

    exact(make(), [batch(i=4, o=4)], loss_fn=loss_fn)


@pytest.mark.parametrize("params", [None, "*layer.1*"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pitfall_07_checkpointing_changes_nothing(reentrant, params):
    model, data = bert(), classes()
    plain = score(model, data, loss_fn=None, params=params)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls = []
    query = model.bert.encoder.layer[1].attention.self.query
    query.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert_same(score(model, data, loss_fn=None, params=params), plain)
    assert len(calls) - pitfalls.VERIFY >= 3  # the batch, one sample's shapes, the batch again


class Segments(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.layer, self.reentrant = nn.Linear(I, I), nn.Linear(I, I), reentrant

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.reentrant).tanh()
        return x


def test_pitfall_07_a_layer_in_two_segments():
    model, data = Segments(True), batch(o=I)
    with pytest.raises(RuntimeError, match="cuts off the gradient"):  # not: zeros
        score(model, data, params="layer.*")
    scores = score(model, data)
    model.reentrant = False  # the oracle asks for gradients of chosen tensors
    truth = fisher_oracle(model, [data], lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


class Restless(nn.Module):
    """Dropout that no mode switches off, statistics of the batch, a buffer that always moves."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(I, 4), nn.BatchNorm1d(4), nn.Linear(4, O)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.last(F.dropout(self.norm(self.first(x).mT).mT, 0.5))


def test_pitfall_08_dropout_and_batch_statistics():
    model, (x, y) = Restless().train(), batch(6)
    scores = score(model, (x, y))
    torch.manual_seed(1)
    assert scores == score(model, (x, y))
    # without two samples the others' scores are what they were
    left_out, alone = score(model, (x[2:], y[2:])), score(model, (x[:2], y[:2]))
    assert_same({n: (4 * left_out[n] + 2 * alone[n]) / 6 for n in scores}, scores)


def test_pitfall_08_buffers_stay_bit_for_bit():
    model = Restless().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    score(model, batch())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(I, O)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def test_pitfall_09_the_order_of_samples_and_the_wrong_axis(monkeypatch):
    model, (x, y) = Turned(), batch(T, T)
    scores = exact(model, [(x, y)])
    order = torch.randperm(T)
    assert_same(score(model, (x[order], y[order])), scores)
    assert_same(score(model, (x[:2], y[:2]), (x[2:], y[2:])), scores)
    assert_sums_to_the_gradient(monkeypatch, model, (x, y))


def test_pitfall_09_an_input_without_a_sample_axis():
    class Relative(nn.Module):
        """A bias for each pair of tokens, of no sample's own, as T5's."""

        def __init__(self):
            super().__init__()
            self.table, self.mix, self.last = nn.Embedding(9, 1), nn.Linear(1, 1), nn.Linear(I, O)

        def forward(self, x):
            t = torch.arange(x.shape[1])
            pairs = self.mix(self.table((t[:, None] - t[None, :]).clamp(-4, 4) + 4))
            return self.last(pairs[..., 0].softmax(-1) @ x)

    exact(Relative(), [batch(T, T)])  # as many samples as tokens


def test_pitfall_09_an_input_that_stands_for_all_samples():
    problem = PROBLEMS["bert"]
    model = problem.model()
    for n in (1, SAMPLES, TOKENS):
        data = {**problem.batch(n), "position_ids": torch.arange(TOKENS)[None]}
        exact(model, [data], problem.loss)


def packed_loss(model, batch):
    """Sequences of unequal lengths, end to end in one axis, as for variable-length attention."""
    lengths = (batch["lengths"]).tolist()
    x = torch.cat([row[:n] for row, n in zip(batch["x"], lengths, strict=True)])
    losses = model(x).square().sum(1)
    return torch.stack([part.sum() for part in losses.split(lengths)])


def ragged(*lengths):
    return {"x": torch.randn(len(lengths), T, I), "labels": torch.tensor(lengths),
            "lengths": torch.tensor(lengths)}  # fmt: skip


@pytest.mark.parametrize("first", [(2, 3, 4), (3, 3, 3), (5, 5, 5)])
def test_pitfall_09_sequences_of_unequal_lengths_end_to_end(first):
    data = [ragged(*first), ragged(1, 3, 5)]
    exact(nn.Linear(I, O), data, lambda *a: packed_loss(*a).sum(), loss_fn=packed_loss)


def test_pitfall_11_batches_add_up_and_nothing_is_counted_twice():
    model, data = network(), [batch(1), batch(), batch(2, 3)]
    scores = assert_exact(model, data, verify=2)  # which scores two of them once more
    assert scores.num_samples == N + 3


def test_pitfall_11_nothing_is_left_from_an_earlier_call():
    model, data = network(), batch()
    scores = score(model, data)
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)

    def stopped():
        yield data
        raise KeyError

    def stops(model, data):
        model[0](data[0])
        raise KeyError

    for batches, loss_fn in ((stopped(), squared_error), ([data], stops)):
        with pytest.raises(KeyError):
            estimate_fisher(model, batches, loss_fn=loss_fn, progress=False, verify=pitfalls.VERIFY)
        assert not any(param._backward_hooks for param in model.parameters())
        assert {type(module).forward for module in model[::3]} == {nn.Linear.forward}
    assert score(model, data) == scores


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(I, I), nn.Linear(I, O)

    def forward(self, x):
        y = self.last(F.relu(self.first(x).add_(0.5), inplace=True))
        return y.add_(1).clamp_(max=1.5)


def test_pitfall_16_what_is_saved_is_changed_in_place():
    exact(InPlace(), [batch()], loss_fn=lambda m, b: m(b[0]).flatten(1).sum(1))


def test_pitfall_16_an_input_changed_after_its_use_is_refused():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(I, O)

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x.mul_(0)
            return y

    model, data = Overwrites(), batch()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared_error(model, data).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score(model, data)


STRIDES = {
    "one number for all": lambda y: y.flatten(1).sum(1),
    "one token for all": lambda y: y.sum(1).square().sum(1),
    "tokens last": lambda y: y.transpose(1, 2).flatten(1).square().sum(1),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_pitfall_16_gradients_with_unusual_strides(backend, strides):
    exact(nn.Linear(I, O), [batch()], loss_fn=lambda m, b: STRIDES[strides](m(b[0])))
    x, y = torch.randn(N, T, I), torch.randn(N, T, O).requires_grad_()
    grad_out = torch.autograd.grad(STRIDES[strides](y.clone()).sum(), y)[0]
    fisher, bias = torch.zeros(O, I), torch.zeros(O)
    linear_fisher_(fisher, x, grad_out, bias_fisher=bias)
    per_sample = torch.einsum("nto,nti->noi", grad_out.double(), x.double())
    assert_matches(fisher, per_sample.square().sum(0), terms=N * T)
    assert_matches(bias, grad_out.double().sum(1).square().sum(0), terms=N * T)


def test_pitfall_17_the_input_is_the_one_that_autocast_multiplied():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    x = torch.tensor([[1 + 2**-8]])  # 1 in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert score(layer, (x, -x.new_ones(1, 1)))["weight"].item() == 1.0


def test_pitfall_17_an_adapters_scale_is_part_of_its_gradient():
    problem = PROBLEMS["bert-lora"]  # scaled by 2, with B drawn
    exact(problem.model(), [problem.batch()], problem.loss)
