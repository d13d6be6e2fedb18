"""Ways in which a Fisher diagonal comes out wrong without a word, each with its detector.

The numbers are those of the list in which the ways were collected; what it calls padding,
autocast and several processes stands with the conditions of scoring.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishkern import FisherVerificationError, estimate_fisher
from fishkern.interception import linear, register_rule, rules
from tests.support.oracle import assert_exact, squared_error
from tests.support.problems import PROBLEMS, bert, class_loss, classes
from tests.support.tolerances import assert_matches, assert_scores_match

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def score(model, *batches, loss_fn=squared_error, **kwargs):
    return estimate_fisher(model, batches, loss_fn=loss_fn, progress=False, **kwargs)


def network():
    return nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, O))


def batch(n=N, t=T):
    return torch.randn(n, t, I), torch.randn(n, t, O)


def assert_same(scores, others):
    assert_scores_match(scores, {name: other.double() for name, other in others.items()})


def test_pitfall_01_square_after_the_sum_over_samples():
    model, (x, y) = network(), batch()
    scores = score(model, (x, y))
    assert_same(score(model, (x.repeat(3, 1, 1), y.repeat(3, 1, 1))), scores)
    # two samples with opposite gradients: no gradient, but information
    layer = nn.Linear(I, O, bias=False)
    x = torch.randn(1, I)
    y = layer(x).detach()
    opposite = score(layer, (x.repeat(2, 1), torch.cat([y + 1, y - 1])))
    assert_matches(opposite["weight"], x.double().square().expand(O, I))


def test_pitfall_02_square_before_the_sum_over_tokens():
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
def test_pitfall_03_losses_reduced_over_the_batch(reduce):
    def loss_fn(model, batch):
        losses = squared_error(model, batch)
        return reduce(losses).expand(len(losses))

    with pytest.raises(FisherVerificationError, match="not a loss per sample"):
        score(network(), batch(), loss_fn=loss_fn)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pitfall_03_the_split_into_batches_does_not_matter(parts):
    model, (x, y) = network(), batch()
    pieces = zip(x.chunk(parts), y.chunk(parts), strict=True)
    assert_same(score(model, *pieces), score(model, (x, y)))


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e6])
def test_pitfall_04_range_and_dtype_of_the_accumulator(scale):
    model, data = network(), batch()
    scaled = score(model, data, loss_fn=lambda *a: scale * squared_error(*a))
    assert {s.dtype for s in scaled.values()} == {torch.float32}
    assert_same({n: s / scale**2 for n, s in scaled.items()}, score(model, data))


def test_pitfall_04_many_samples_in_a_narrow_dtype():
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    layer.weight.data.zero_()
    ones = torch.ones(700, 1, dtype=torch.bfloat16)  # a bfloat16 accumulator stops at 256
    assert score(layer, (ones, ones))["weight"].item() == 1


def test_pitfall_05_a_parameter_with_several_uses():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.last = nn.Linear(I, I), nn.LayerNorm(I), nn.Linear(I, O)

        def forward(self, x):
            for _ in range(3):
                x = x + self.norm(self.layer(x)).tanh()
            return self.last(x)

    # in front of a norm a bias's gradient is a small rest of large terms, in any float32
    assert_exact(Shared(), [batch(), batch(2, 7)], dtype=torch.float32)


def test_pitfall_06_a_use_that_no_rule_sees():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(I, I), nn.Linear(I, O)

        def forward(self, x):
            return self.last(self.layer(x)) + self.layer.weight[:O, 0] + self.last.weight.norm()

    scores = assert_exact(Outside(), [batch()], verify=0)
    assert {scores.routes[f"{name}.weight"] for name in ("layer", "last")} == {"loop"}


def test_pitfall_07_checkpointing_changes_nothing():
    model, data = bert(), [classes()]
    plain = estimate_fisher(model, data, progress=False)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(estimate_fisher(model, data, progress=False), plain)


def test_pitfall_08_dropout_and_batch_statistics():
    model = nn.Sequential(nn.Linear(I, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, O))
    model.train()
    x, y = torch.randn(6, I), torch.randn(6, O)
    scores = score(model, (x, y))
    assert scores == score(model, (x, y))
    # without one sample the others' scores are what they were
    left_out = score(model, (x[1:], y[1:]))
    alone = score(model, (x[:1], y[:1]))
    assert_same({n: (5 * left_out[n] + alone[n]) / 6 for n in scores}, scores)


def test_pitfall_09_the_order_of_samples_and_the_wrong_axis():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(I, O)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model, (x, y) = Turned(), batch(T, T)
    scores = assert_exact(model, [(x, y)])
    order = torch.randperm(T)
    assert_same(score(model, (x[order], y[order])), scores)
    assert_same(score(model, (x[:2], y[:2]), (x[2:], y[2:])), scores)


def test_pitfall_10_ignored_labels_and_padding_tokens():
    problem = PROBLEMS["llama-untied"]
    model, data = problem.model(), problem.batch()
    scores = assert_exact(model, [data], problem.loss)
    other = {**data, "input_ids": data["input_ids"].masked_fill(data["attention_mask"] == 0, 7)}
    assert_same(estimate_fisher(model, [other], progress=False), scores)


def test_pitfall_11_nothing_is_left_from_an_earlier_call():
    model, data = network(), batch()
    scores = score(model, data)
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.nan)

    def stopped():
        yield data
        raise KeyError

    with pytest.raises(KeyError):
        estimate_fisher(model, stopped(), loss_fn=squared_error, progress=False)
    assert score(model, data) == scores
    assert scores.num_samples == N


def test_pitfall_12_softmax_regression_in_closed_form():
    layer, x, y = nn.Linear(I, 4), torch.randn(N, I), torch.randint(4, (N,))
    scores = score(
        layer, (x, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    grad = (layer(x).softmax(1) - F.one_hot(y, 4)).detach().double()
    assert_matches(scores["weight"], torch.einsum("no,ni->oi", grad**2, x.double() ** 2) / N)
    assert_matches(scores["bias"], grad.square().mean(0))
    assert scores.labels == "empirical"


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


def test_pitfall_16_what_is_saved_is_changed_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(I, I), nn.Linear(I, O)

        def forward(self, x):
            y = self.last(F.relu(self.first(x).add_(0.5), inplace=True))
            return y.add_(1).clamp_(max=1.5)

    assert_exact(InPlace(), [batch()], loss_fn=lambda m, b: m(b[0]).flatten(1).sum(1))


def test_pitfall_18_the_first_call_equals_the_second():
    model, data = nn.Linear(19, 23), (torch.randn(3, 11, 19), torch.randn(3, 11, 23))
    first = score(model, data, verify=0)  # shapes that no other test uses
    assert first == score(model, data, verify=0)


def test_pitfall_19_a_fresh_adapter_has_no_information_in_a():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(bert(), config)
    scores = assert_exact(model, [classes()], class_loss)
    for name, value in scores.items():
        assert bool(value.count_nonzero()) is ("lora_B" in name)


# What no test above can foresee, verify finds.


class Mixing(nn.Module):
    """Each sample's input less the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(I, I), nn.Linear(I, O)

    def forward(self, x):
        return self.last(self.first(x - x.mean(0)).tanh())


def test_samples_that_depend_on_each_other_are_found():
    with pytest.raises(FisherVerificationError, match="samples depend on each other"):
        score(Mixing(), batch())
    assert score(Mixing(), batch(), verify=0).num_samples == N


def test_a_first_batch_of_one_sample_does_not_hide_the_others():
    with pytest.raises(FisherVerificationError, match="samples depend on each other"):
        score(Mixing(), batch(1), batch())


class Half(nn.Linear):
    """A made-up layer type."""


class SquaresTokens(linear.LinearRule):
    def fisher_(self, *args):
        *rest, x, grad_out = args
        super().fisher_(*rest, x.flatten(0, 1), grad_out.flatten(0, 1))


class Forgets(linear.LinearRule):
    def fisher_(self, *args):
        pass


class Doubles(linear.LinearRule):
    def input_grad(self, *args):
        return 2 * super().input_grad(*args)


@pytest.mark.parametrize("rule", [SquaresTokens, Forgets, Doubles])
def test_a_wrong_rule_is_found(rule, monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    model = nn.Sequential(nn.Linear(I, I), Half(I, O))
    data = batch()
    correct = score(model, data)
    assert correct.routes["1.weight"] != "fused"
    register_rule(Half, linear.LinearRule())
    assert_same(score(model, data), correct)
    register_rule(Half, rule())
    with pytest.raises(FisherVerificationError, match=r"differ.*(0|1)\.(weight|bias) by"):
        score(model, data)
    wrong = score(model, data, verify=0)
    assert any(not torch.allclose(wrong[name], correct[name]) for name in correct)


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
def test_packed_sequences_of_unequal_lengths(first):
    model = nn.Linear(I, O)
    data = [ragged(*first), ragged(1, 3, 5)]
    assert_exact(model, data, lambda *a: packed_loss(*a).sum(), loss_fn=packed_loss)
