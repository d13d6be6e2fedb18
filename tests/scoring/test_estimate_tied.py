"""An embedding tied to the head, and parameters whose uses are of several kinds."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fishkern import SparseMask, estimate_fisher
from fishkern.interception import register_rule, rules
from fishkern.interception.embedding import EmbeddingRule
from fishkern.interception.linear import LinearRule
from fishkern.scoring.tied import head_rows
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.problems import (
    PROBLEMS,
    VOCAB,
    decoder_loss,
    language,
    llama,
    next_token_loss,
    sequences,
)
from tests.support.tolerances import SCORE, assert_matches, assert_scores_match

N, T, H, V = 4, 5, 3, 7  # samples, tokens, features, rows


class Tied(nn.Module):
    """An embedding, two layers, and a head that shares the embedding's weight."""

    def __init__(self, uses=1, bias=True, padding_idx=None, detached=False):
        super().__init__()
        self.emb = nn.Embedding(V, H, padding_idx=padding_idx)
        self.first, self.head = nn.Linear(H, H), nn.Linear(H, V, bias=bias)
        self.head.weight = self.emb.weight
        self.uses, self.detached = uses, detached

    def forward(self, ids):
        x = self.emb(ids)
        x = x.detach() if self.detached else x
        for _ in range(self.uses - 1):
            x = x + self.emb(ids.flip(1)[:, 1:]).mean(1, keepdim=True)
        return self.head(self.first(x).tanh())


def batch(n=N, t=T):
    return torch.randint(V, (n, t)), torch.randn(n, t, V)


@pytest.mark.parametrize("n", [1, 2, N, T])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_tied_head_is_exact(uses, n):
    scores = assert_exact(Tied(uses), [batch(n), batch(3, 8), batch(n, 1 if uses == 1 else 2)])
    assert set(scores.routes.values()) == {"fused"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_tied_head_with_padding(padding_idx, bias):
    scores = assert_exact(Tied(2, bias, padding_idx), [batch(), batch()])
    assert set(scores.routes.values()) == {"fused"}


def test_a_tied_head_with_a_detached_embedding():
    assert_exact(Tied(1, detached=True), [batch(), batch()])
    assert_exact(Tied(2, detached=True), [batch(), batch()])


def test_a_sample_whose_gradients_cancel_has_no_negative_score():
    model = Tied(bias=False)
    model.first = nn.Identity()
    model.forward = lambda ids: model.head(model.emb(ids))

    def loss_fn(model, batch):
        return (model(batch[0]) * batch[1]).flatten(1).sum(1)

    # The logits are w w^T, the weights of the loss antisymmetric: the gradient is zero, but not
    # those of the head and of the embedding.
    ids, weights = torch.arange(V).repeat(2, 1), torch.randn(2, V, V)
    data = [(ids, weights - weights.mT)]
    scores = estimate_fisher(model, data, loss_fn=loss_fn, progress=False, verify=0)
    assert all((score >= 0).all() for score in scores.values())


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "bert-masked"])
def test_models_with_a_tied_head_are_fused(name):
    problem = PROBLEMS[name]
    scores = assert_exact(problem.model(), [problem.batch(), problem.batch(3, 9)], problem.loss)
    tied = {
        "gpt2": "transformer.wte.weight",
        "llama-tied": "model.embed_tokens.weight",
        "t5": "shared.weight",
        "bert-masked": "bert.embeddings.word_embeddings.weight",
    }[name]
    assert scores.routes[tied] == "fused"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_tied_head_under_checkpointing(reentrant):
    model = PROBLEMS["llama-tied"].model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    scores = assert_exact(model, [language()], next_token_loss)
    assert scores.routes["model.embed_tokens.weight"] == "fused"


def test_labels_drawn_for_a_tied_head():
    model, ids = llama(tie_word_embeddings=True), torch.randint(VOCAB, (N, T))
    kwargs = {"labels": "sampled", "progress": False, "params": "*embed_tokens*"}
    a, b = (estimate_fisher(model, [{"input_ids": ids}], **kwargs) for _ in range(2))
    assert a == b
    assert set(a.routes.values()) == {"fused"}


def test_sums_by_sample_of_a_tied_head():
    model, data = Tied(2), batch()
    dense = torch.rand(V, H) < 0.5
    mask = SparseMask({"emb.weight": dense.flatten().nonzero().flatten()}, {"emb.weight": (V, H)})
    kwargs = {"loss_fn": squared_error, "progress": False, "params": "emb.weight"}
    scores = estimate_fisher(model, [data], sample_scores=mask, **kwargs)
    for n in range(N):
        one = estimate_fisher(model, [tuple(t[n : n + 1] for t in data)], **kwargs)
        total = one["emb.weight"][dense].sum()
        torch.testing.assert_close(scores.sample_scores[n], total, rtol=SCORE, atol=0)


class Functional(Tied):
    """From a length on, the weight is also used where no rule sees it, before and after."""

    def __init__(self, start, place):
        super().__init__()
        self.start, self.place = start, place

    def forward(self, ids):
        stray = ids.shape[1] >= self.start
        x = self.emb(ids)
        if stray and self.place == "before":
            x = x + F.embedding(ids, self.emb.weight)
        y = self.head(self.first(x).tanh())
        return y + F.linear(x, self.emb.weight) if stray and self.place == "after" else y


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_stray_use_beside_a_tied_head(place):
    scores = assert_exact(Functional(0, place), [batch(), batch()])
    assert scores.routes["emb.weight"] == "loop"


def test_a_stray_use_beside_a_tied_head_in_a_later_batch_is_refused():
    model = Functional(6, "before")
    with pytest.raises(RuntimeError, match=r"emb.weight.* in a later batch only"):
        estimate_fisher(model, [batch(), batch(t=6)], loss_fn=squared_error, progress=False)


def test_nothing_of_the_size_of_the_logits_is_held(monkeypatch):
    """After the head's turn, and until the embedding's."""
    alive, seen = [], []
    fisher_ = LinearRule.fisher_

    def watch(self, module, fishers, x, grad_out, **kwargs):
        if grad_out.shape[-1] == V:
            alive.append(weakref.ref(grad_out))
        else:
            gc.collect()
            seen.append([ref() is not None for ref in alive])
        return fisher_(self, module, fishers, x, grad_out, **kwargs)

    monkeypatch.setattr(LinearRule, "fisher_", watch)
    model = Tied(bias=False)
    kwargs = {"loss_fn": squared_error, "progress": False, "verify": 0}
    assert set(estimate_fisher(model, [batch()], **kwargs).routes.values()) == {"fused"}
    assert seen == [[False]]


def test_rows_of_the_heads_gradient():
    ids, x, grad_out = torch.randint(V, (N, 6)), torch.randn(N, T, H), torch.randn(N, T, V)
    kept = head_rows(ids, x, grad_out)
    dense = grad_out.double().mT @ x.double()
    wanted, grads = ids.flip(1)[:, :4], torch.randn(N, 4, H)
    truth = 2 * dense[torch.arange(N)[:, None], wanted] * grads
    assert kept.rows.shape == (N, 6, H)
    assert_matches(kept.cross(wanted, grads), truth, terms=T)


# Uses of several kinds.


class Mixed(nn.Module):
    """One vector as a norm's weight, a linear layer's bias, and a scale."""

    def __init__(self, uses):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(H), nn.Linear(H, H), nn.Linear(H, 2)
        self.uses = uses
        if "norm" in uses:
            self.norm.weight = self.first.bias
        if "scale" in uses:
            self.scale = self.first.bias

    def forward(self, x):
        x = self.first(self.norm(x)).tanh()
        return self.last(x * self.scale if "scale" in self.uses else x)


@pytest.mark.parametrize("uses", ["norm", "scale", "norm, scale"])
@pytest.mark.parametrize("n", [1, N, T])
def test_uses_of_several_kinds_add_up_before_squaring(uses, n):
    data = [(torch.randn(n, T, H), torch.randn(n, T, 2)) for _ in range(2)]
    scores = assert_exact(Mixed(uses), data)
    assert set(scores.routes.values()) == {"fused"}


def test_a_head_that_is_also_an_activations_factor():
    class Model(Tied):
        def forward(self, ids):
            return super().forward(ids) * self.emb.weight[:, 0]

    assert_exact(Model(), [batch(), batch()])


class Transposed(nn.Module):
    """An embedding, and as the last layer ``x @ W`` with its weight ``W [V, features]``."""

    def __init__(self, features, head=False):
        super().__init__()
        self.emb, self.wide = nn.Embedding(V, features), nn.Linear(features, V)
        self.last = Conv1D(features, V)
        self.last.weight = self.emb.weight
        if head:  # and the other way round as well
            self.head = nn.Linear(features, V, bias=False)
            self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        x = self.head(x) if hasattr(self, "head") else x
        return self.last(self.wide(x).tanh())


@pytest.mark.parametrize(("features", "head"), [(H, False), (V, False), (V, True)])
@pytest.mark.parametrize("n", [1, N, T])
def test_an_embedding_tied_to_a_transposed_layer(features, head, n):
    data = [(torch.randint(V, (n, T)), torch.randn(n, T, features)) for _ in range(2)]
    scores = assert_exact(Transposed(features, head), data)
    assert set(scores.routes.values()) == {"fused"}


class Doubled(nn.Embedding):
    """An embedding that scales its rows, as Gemma's does."""

    def forward(self, ids):
        return 2 * super().forward(ids)


class DoubledRule(EmbeddingRule):
    def sample_grads(self, module, x, grad_out):
        return super().sample_grads(module, x, 2 * grad_out)

    def fisher_(self, module, fishers, x, grad_out, **kwargs):
        super().fisher_(module, fishers, x, 2 * grad_out, **kwargs)


def test_a_tied_embedding_with_a_rule_of_its_own(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register_rule(Doubled, DoubledRule())
    model = Tied()
    model.emb.__class__ = Doubled
    scores = assert_exact(model, [batch(), batch()])
    assert set(scores.routes.values()) == {"fused"}


def test_t5_scores_its_shared_embedding_in_three_places():
    model = PROBLEMS["t5"].model()
    batches = [sequences(), sequences(3, 9)]
    scores = estimate_fisher(model, batches, params="shared.weight", progress=False)
    assert scores.routes == {"shared.weight": "fused"}
    assert_scores_match(scores, fisher_oracle(model, batches, decoder_loss, list(scores)))
