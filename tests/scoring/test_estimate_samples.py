"""What scoring takes from a batch: whose tokens, losses and tensors are whose."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from fishkern import FisherVerificationError, estimate_fisher
from fishkern.batches.losses import default_loss
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.tolerances import assert_scores_match

N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def score(model, batches, loss_fn=squared_error, **kwargs):
    return estimate_fisher(model, batches, loss_fn=loss_fn, progress=False, **kwargs)


def assert_equals_oracle(scores, model, batches):
    truth = fisher_oracle(model, batches, lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


def network():
    return nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.Linear(4, O))


def pairs(n=N):
    return torch.randn(n, I), torch.randn(n, O)


# Tokens gathered from all samples into one list.


class Gathering(nn.Module):
    """Two layers, each of which sees the tokens that are routed to it (by 0 or 1)."""

    def __init__(self):
        super().__init__()
        self.experts, self.last = nn.ModuleList([nn.Linear(I, I), nn.Linear(I, I)]), nn.Linear(I, O)

    def forward(self, x, route):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = route == number
            if chosen.any():
                y = y.masked_scatter(chosen.unsqueeze(-1), expert(x[chosen]).tanh())
        return self.last(y.sum(1))


def routed(*rows):
    route = torch.tensor(rows)
    return {
        "x": torch.randn(*route.shape, I), "route": route, "labels": torch.randint(O, (len(rows),))
    }  # fmt: skip


def gathering_loss(model, batch):
    return F.cross_entropy(model(batch["x"], batch["route"]), batch["labels"], reduction="none")


FULL, HALF = (0, 0, 0, 0), (0, 0, 1, 1)


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    "batches",
    [
        [[FULL, FULL], [(0, 0, 0, 2), (0, 2, 2, 2)]],  # padding left out, of equal lengths first
        [[(0, 0, 0, 2), (0, 0, 0, 2), (0, 0, 2, 2), FULL]],  # the first samples have the mean
        [[HALF, (1, 0, 1, 0)], [(0, 0, 0, 1), (0, 1, 1, 1)]],  # experts
        [[(0, 1, 1, 1), (0, 0, 1, 1), (0, 1, 1, 1), (1, 1, 1, 1)]],
    ],
)
def test_gathered_tokens_are_exact(batches, verify):
    data = [routed(*rows) for rows in batches]
    loss = gathering_loss
    scores = assert_exact(Gathering(), data, lambda *a: loss(*a).sum(), loss_fn=loss, verify=verify)
    assert scores.routes["experts.0.weight"] == "loop"
    assert scores.routes["last.weight"] == "fused"


def test_gathering_all_tokens_is_a_layout():
    data, loss = [routed(FULL, FULL), routed(FULL, FULL, FULL)], gathering_loss
    scores = assert_exact(Gathering(), data, lambda *a: loss(*a).sum(), loss_fn=loss)
    assert scores.routes["experts.0.weight"] == "fused"


# Losses and tensors that are not the samples' own.


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(N, O, 1)

    def forward(self, x, scale):
        return self.layer(x * scale.view(-1, 1)).mean(-1)


def test_a_tensor_for_all_samples_as_long_as_the_batch():
    def loss_fn(model, batch):
        return squared_error(lambda x: model(x, batch["scale"]), (batch["x"], batch["labels"]))

    scale = torch.arange(1.0, N + 1)
    batch = {"x": torch.randn(N, N, T), "scale": scale, "labels": torch.randn(N, O)}
    with pytest.raises(
        FisherVerificationError, match=r"sample \d has the loss .* \(\[1, \.\.\.\]\)"
    ):
        score(Scaled(), [batch], loss_fn)


def test_losses_over_the_number_of_samples_without_a_fused_layer():
    model = nn.Sequential(nn.Conv1d(I, O, 1), nn.Flatten())
    batch = torch.randn(N, I, 1), torch.randn(N, O)
    with pytest.raises(FisherVerificationError, match=r"alone, but .* in its batch of 4"):
        score(model, [batch], lambda m, b: squared_error(m, b) / len(b[0]))


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("verify", [0, 2])
def test_a_loss_for_the_whole_batch_is_refused(kind, verify):
    with pytest.raises(ValueError, match="returned 1 losses for a batch of 4"):
        score(
            network(), [kind(pairs())], lambda *a: squared_error(*a).mean().view(1), verify=verify
        )


@pytest.mark.parametrize("layer", [nn.Linear(I, O), nn.Bilinear(I, I, O)])
def test_losses_without_a_graph_are_refused(layer):
    model = layer if isinstance(layer, nn.Linear) else Twice(layer)
    with pytest.raises(ValueError, match=r"losses require no gradient.*detach"):
        score(model, [pairs()], lambda *a: squared_error(*a).detach(), verify=0)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


def test_candidates_that_all_take_no_part_have_zeros():
    model = network()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    scores = score(model, [pairs()], params="unused.*")
    assert not any(s.any() for s in scores.values())


def test_functional_dropout_that_is_always_on():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(I, O)

        def forward(self, x):
            return F.dropout(self.layer(x), 0.5)

    model, batch = Dropping(), pairs()
    scores = score(model, [batch])
    plain = score(model.layer, [batch])
    assert all(torch.equal(scores[f"layer.{name}"], plain[name]) for name in plain)


# Autocast inside, narrow and wide dtypes.


def test_autocast_inside_the_loss():
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(batch[0])
        return 0.5 * (y.float() - batch[1]).square().sum(1)

    for _ in range(5):  # the rounding differs more than float32 would allow in most
        score(network(), [pairs(8)], loss_fn)


def test_the_models_own_loss_from_narrow_logits_in_float32():
    class Output:
        def __init__(self, logits, loss):
            self.logits, self.loss = logits, loss

    class Model(nn.Module):
        def forward(self, labels, logits):
            loss = F.cross_entropy(logits, labels).bfloat16().float() * 1.01
            return Output(logits, loss)

    logits, labels = torch.randn(4, 3).bfloat16().float(), torch.tensor([0, 1, 2, 0])
    batch = {"logits": logits, "labels": labels}
    model = Model()
    assert default_loss(model)(model, batch).shape == (4,)
    with pytest.raises(ValueError, match="trains on something else"):
        default_loss(model)(model, {**batch, "logits": logits + 1e-4})


def test_float64_under_autocast_stays_in_float64():
    model, batch = network().double(), [t.double() for t in pairs()]
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, [tuple(batch)])
    assert_equals_oracle(scores, model, [tuple(batch)])


# Batches without samples, batches of objects.


def as_mapping(batch):
    return {"x": batch[0], "labels": batch[1]}


def mapping_loss(model, batch):
    return squared_error(model, (batch["x"], batch["labels"]))


class Opaque:
    def __init__(self, batch):
        self.batch = batch


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "loss_fn"),
    [
        (tuple, squared_error),
        (as_mapping, mapping_loss),
        (Opaque, lambda model, batch: squared_error(model, batch.batch)),
    ],
)
def test_an_empty_batch_changes_nothing(kind, loss_fn, at):
    batches = [kind(pairs()), kind(pairs())]
    model = network()
    scores = score(model, batches, loss_fn)
    batches.insert(at, kind(pairs(0)))
    with_empty = score(model, batches, loss_fn)
    assert with_empty == scores
    assert with_empty.routes == scores.routes


def test_arrays_beside_tensors_are_read_by_loss_fn_alone():
    def loss_fn(model, batch):
        return squared_error(model, [torch.as_tensor(np.asarray(b)) for b in batch])

    model, (x, y) = network().double(), (torch.randn(N, I).double(), torch.randn(N, O).double())
    scores = score(model, [(x.numpy(), y.numpy())], loss_fn)
    assert_equals_oracle(scores, model, [(x, y)])


def test_packed_sequences_are_not_cut():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.LSTM(I, 4), nn.Linear(4, O)

        def forward(self, x):
            return self.last(self.layer(x)[1][0][0])

    model, sequences, y = Recurrent(), [torch.randn(3, I), torch.randn(2, I)], torch.randn(2, O)
    scores = score(model, [(pack_sequence(sequences), y)])
    parts = [score(model, [(pack_sequence([s]), y[n : n + 1])]) for n, s in enumerate(sequences)]
    assert_scores_match(scores, {n: (parts[0][n] + parts[1][n]).double() / 2 for n in scores})


def test_without_labels_most_tensors_say_how_many_samples():
    x, y = pairs(8)

    def loss_fn(model, batch):
        return squared_error(model, (batch["x"], batch["y"])) * batch["weight"]

    batch = {"weight": torch.ones(1), "x": x, "y": y}
    model = network()
    scores = score(model, [batch], loss_fn, num_samples=5)
    assert scores.num_samples == 5
    assert_equals_oracle(scores, model, [(x[:5], y[:5])])


def test_a_bias_does_not_need_its_layers_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(I, O)

        def forward(self, x):
            x = x * 1
            y = self.layer(x)
            x.add_(1)
            return y + x.sum(-1, keepdim=True)

    model, batch = InPlace(), pairs()
    scores = score(model, [batch], params="layer.bias")
    assert scores.routes["layer.bias"] == "fused"
    truth = fisher_oracle(model, [batch], lambda *a: squared_error(*a).sum(), ["layer.bias"])
    assert_scores_match(scores, truth)


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize(
    "batches",
    [
        # single tokens first, later as many as there are samples, not one of each
        [[(0,), (0,), (0,)], [(0, 0), (0, 1), (1, 1)]],
        [[(0,), (0,), (0,)], [(0, 0), (0, 2), (2, 2)]],
        # one of each first, and others elsewhere
        [[(0, 1, 1), (1, 0, 1), (1, 1, 0)], [(0, 0, 1), (0, 1, 1), (1, 1, 1)]],
        [[(0, 1, 1), (1, 0, 1), (1, 1, 0)], [(0, 0, 2), (0, 2, 2), (2, 2, 2)]],
    ],
)
def test_as_many_tokens_as_samples_in_a_later_batch(batches, verify):
    data, loss = [routed(*rows) for rows in batches], gathering_loss
    assert_exact(Gathering(), data, lambda *a: loss(*a).sum(), loss_fn=loss, verify=verify)


def test_single_outputs_of_each_sample_are_not_asked_for_again():
    """Neither in a model without lists nor in one of flattened tokens."""

    class Pooled(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.flat, self.first, self.last = flat, nn.Linear(I, I), nn.Linear(I, O)

        def forward(self, x):
            y = self.first(x.flatten(0, 1)).view(x.shape) if self.flat else self.first(x)
            return self.last(y.tanh().mean(1))

    for flat in (False, True):
        model, sizes = Pooled(flat), []
        model.register_forward_pre_hook(
            lambda module, args, sizes=sizes: sizes.append(len(args[0]))
        )
        data = [(torch.randn(N, t, I), torch.randn(N, O)) for t in (T, T, 7)]
        assert set(score(model, data, verify=0).routes.values()) == {"fused"}
        assert sizes[-2:] == [N, N]
