"""Ways in which a Fisher diagonal comes out wrong without a word, each with its detector.

``python -m tests.mutations`` plants each of them in the package and sees its test fail, with the
self-check of scoring switched off (``VERIFY``): the detectors do without it.

====== ===========================================================================
number pitfall
====== ===========================================================================
01     square after the sum over samples
02     square before the sum over tokens
03     losses reduced over samples, tokens, batches, or scaled
04     squares and sums in a narrow dtype
05     a parameter with several uses: the sum of squares instead of the square of the sum
06     a use outside the module, which no rule sees
07     checkpointing: layers run twice, or get no gradient
08     dropout and batch statistics left on, buffers moved
09     the wrong sample axis, inputs without one, tokens of several samples in one axis
10     padding and ignored labels
11     stale or half state
12     labels of the data against labels drawn from the model
13     labels drawn per batch instead of per sample
14     token sums split before the square, what lies outside the operands, narrow products
15     several processes: averages, unequal numbers of samples, shards
16     tensors changed in place after their use, gradients with unusual strides
17     autocast: inputs kept before their cast
18     tuning on the live accumulator
19     a fresh adapter's zeros taken for scores
20     a value that depends on the route
====== ===========================================================================
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import FisherDiagonal, FisherVerificationError, estimate_fisher, select
from fishkern.functional import linear_fisher_
from fishkern.interception import rules
from fishkern.scoring import passes as scoring
from fishkern.scoring import squares
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.problems import (
    PROBLEMS,
    SAMPLES,
    TOKENS,
    bert,
    class_loss,
    classes,
)
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

VERIFY = 0
N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def score(model, *batches, loss_fn=squared_error, **kwargs):
    kwargs = {"verify": VERIFY, "progress": False, **kwargs}
    return estimate_fisher(model, batches, loss_fn=loss_fn, **kwargs)


def exact(model, batches, *args, **kwargs):
    return assert_exact(model, batches, *args, **{"verify": VERIFY, **kwargs})


def network():
    return nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, O))


def batch(n=N, t=T, i=I, o=O):
    return torch.randn(n, t, i), torch.randn(n, t, o)


def assert_same(scores, others):
    assert_scores_match(scores, {name: other.double() for name, other in others.items()})


def assert_sums_to_the_gradient(monkeypatch, model, data, loss_fn=squared_error):
    """With the squares left out everywhere, scores are the ordinary gradient over N.

    One checksum for uses that are missed, counted twice, or taken from the wrong place.
    """

    def sums(self, module, fishers, x, grad_out, **_):
        for name, fisher in fishers.items():
            fisher += self.param_grad(module, name, x, grad_out)

    def add(self, *args):
        *_, name, grad = args
        self.scores[name] += grad

    with monkeypatch.context() as patch:
        for rule in set(rules._RULES.values()):
            patch.setattr(type(rule), "fisher_", sums)
        patch.setattr(squares.Squares, "add_grad", add)
        sums = score(model, data, loss_fn=loss_fn, verify=0)
    losses = loss_fn(model.eval(), data)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(losses.mean(), list(params.values()))
    assert_same(sums, dict(zip(params, grads, strict=True)))


def test_pitfall_01_square_after_the_sum_over_samples(backend):
    model, (x, y) = network(), batch()
    scores = score(model, (x, y))
    assert_same(score(model, (x.repeat(3, 1, 1), y.repeat(3, 1, 1))), scores)
    # two samples with opposite gradients: no gradient, but information
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
    # two tokens with opposite gradients: nothing
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
    assert len(calls) - VERIFY >= 3  # the batch, one sample's shapes, the batch again


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


# Equal lengths in the first batch do not make its layout ([N * T]) that of a later one.
@pytest.mark.parametrize("first", [(2, 3, 4), (3, 3, 3), (5, 5, 5)])
def test_pitfall_09_sequences_of_unequal_lengths_end_to_end(first):
    data = [ragged(*first), ragged(1, 3, 5)]
    exact(nn.Linear(I, O), data, lambda *a: packed_loss(*a).sum(), loss_fn=packed_loss)


def test_pitfall_10_ignored_labels_and_padding_tokens():
    problem = PROBLEMS["llama-untied"]
    model, data = problem.model(), problem.batch()
    scores = exact(model, [data], problem.loss)
    other = {**data, "input_ids": data["input_ids"].masked_fill(data["attention_mask"] == 0, 7)}
    assert_same(score(model, other, loss_fn=None), scores)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_10_longer_padding(side):
    problem = PROBLEMS["bert-tokens"]
    model, data = problem.model(), problem.batch()
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    pads = (3, 0) if side == "left" else (0, 3)
    longer = {key: F.pad(value, pads, value=fill[key]) for key, value in data.items()}
    if side == "left":  # positions must stay those of the tokens
        longer["position_ids"] = (torch.arange(TOKENS + 3) - 3).clamp(min=0).repeat(SAMPLES, 1)
    assert_same(score(model, longer, loss_fn=None), score(model, data, loss_fn=None))


def test_pitfall_10_the_row_of_a_padding_index():
    model = nn.Sequential(nn.Embedding(7, I, padding_idx=2), nn.Linear(I, O))
    data = torch.randint(7, (N, T)), torch.randn(N, T, O)
    data[0][:, 0] = 2
    scores = score(model, data)
    assert not scores["0.weight"][2].count_nonzero()
    truth = fisher_oracle(model, [data], lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


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
            estimate_fisher(model, batches, loss_fn=loss_fn, progress=False, verify=VERIFY)
        assert not any(param._backward_hooks for param in model.parameters())
        assert {type(module).forward for module in model[::3]} == {nn.Linear.forward}
    assert score(model, data) == scores


class Ranks:
    """``all_reduce`` among ranks that run one after the other; the last one has the result."""

    def __init__(self, monkeypatch, size):
        self.size, self.rank, self.given, self.call = size, -1, [], 0
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: self.rank)

    def next(self):
        """The process group, seen by the next rank."""
        self.rank, self.call = self.rank + 1, 0
        return self

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        assert group is self
        if self.call == len(self.given):
            self.given.append(torch.zeros_like(tensor))
        self.given[self.call] += tensor
        tensor.copy_(self.given[self.call])
        if op == torch.distributed.ReduceOp.AVG:
            tensor /= self.size
        self.call += 1


class Logits(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(I, num_classes)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def test_pitfall_12_softmax_regression_in_closed_form():
    model, x, y = Logits(4), torch.randn(N, I), torch.randint(4, (N,))
    p = model(x).logits.softmax(1).detach().double()
    squares = {"empirical": (p - F.one_hot(y, 4)).square(), "expected": p * (1 - p)}
    for labels, square in squares.items():
        scores = score(model, {"x": x, "labels": y}, loss_fn=None, labels=labels)
        expected = torch.einsum("no,ni->oi", square, x.double().square()) / N
        assert_matches(scores["layer.weight"], expected, terms=N)
        assert_matches(scores["layer.bias"], square.mean(0), terms=N)
        assert scores.labels == labels


def test_pitfall_13_each_sample_draws_its_own_label():
    model, x = Logits(3), torch.randn(1, I)
    exact = score(model, {"x": x}, loss_fn=None, labels="expected")
    drawn = score(model, {"x": x.repeat(3000, 1)}, loss_fn=None, labels="sampled")
    for name in exact:
        assert torch.allclose(drawn[name], exact[name], rtol=0.1)


def test_pitfall_13_ranks_with_equal_seeds_draw_differently(monkeypatch):
    model, data = Logits(3), {"x": torch.randn(50, I)}
    ranks = Ranks(monkeypatch, 2)
    first, both = (
        score(model, data, loss_fn=None, labels="sampled", process_group=ranks.next())
        for _ in range(2)
    )
    assert not torch.equal(first["layer.bias"], both["layer.bias"])


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


def test_pitfall_15_ranks_with_unequal_numbers_of_samples(monkeypatch):
    model, data = network(), [batch(3), batch(2), batch(1)]
    ranks = Ranks(monkeypatch, len(data))
    scores = [score(model, part, process_group=ranks.next()) for part in data]
    assert scores[-1].num_samples == 6
    assert_same(scores[-1], score(model, *data))


def test_pitfall_15_shards_are_refused():
    model = nn.Linear(I, O)
    model.weight.placements = ()  # as a DTensor has them
    with pytest.raises(ValueError, match=r"'weight' is sharded"):
        score(model, batch())


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


@pytest.mark.parametrize("samples", [1, 3])
def test_pitfall_18_the_first_call_equals_the_second(backend, samples):
    model, data = nn.Linear(19, 23), batch(samples, 11, 19, 23)  # shapes that no other test uses
    first = score(model, data)
    assert first == score(model, data)


def test_pitfall_19_a_fresh_adapter_has_no_information_in_a():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(bert(), config)
    scores = exact(model, [classes()], class_loss)
    for name, value in scores.items():
        assert bool(value.count_nonzero()) is ("lora_B" in name)
    with pytest.warns(UserWarning, match="all scores are zero in 2 of 4 tensors: .*lora_A"):
        select(scores, k=4)


def test_pitfall_19_zeros_that_fill_the_budget_are_named():
    scores = FisherDiagonal({"weight": torch.tensor([0.0, 1.0, 0.0])}, num_samples=1)
    with pytest.warns(UserWarning, match="1 of the 2 selected entries have a score of zero"):
        select(scores, k=2)


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
