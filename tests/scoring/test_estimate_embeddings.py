"""Embeddings: a row's score is of the squares of its samples' sums over their own tokens."""

import pytest
import torch
from torch import nn

from tests.support.oracle import assert_exact

N, T, V, H = 4, 6, 9, 5  # samples, tokens, rows, features


class Lookup(nn.Module):
    """Rows, and a layer that makes their gradients differ from token to token."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.last = nn.Embedding(V, H, **options), nn.Linear(H, 3)

    def forward(self, ids):
        return self.last(self.table(ids).tanh())


def batch(*shape, low=0):
    return torch.randint(low, V, shape), torch.randn(*shape, 3)


def route(model, batches, **kwargs):
    return assert_exact(model, batches, **kwargs).routes["table.weight"]


def test_rows_that_recur_in_samples_and_batches():
    batches = [batch(N, T), batch(2, 30), batch(3, 1)]
    assert route(Lookup(), batches) == "fused"


def test_every_token_of_one_row():
    model, y = Lookup(), torch.randn(N, T, 3)
    scores = assert_exact(model, [(torch.full((N, T), 4), y)])
    assert scores["table.weight"].any(1).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_a_padding_row_has_no_score(padding_idx):
    model = Lookup(padding_idx=padding_idx)
    scores = assert_exact(model, [batch(N, T), batch(N, T)])
    assert scores.routes["table.weight"] == "fused"
    assert not scores["table.weight"][padding_idx].any()


@pytest.mark.parametrize("shape", [(N,), (N, 2, 3)], ids=str)
def test_any_number_of_token_dimensions(shape):
    assert route(Lookup(), [batch(*shape)]) == "fused"


def test_narrow_ids():
    ids, y = batch(N, T)
    assert route(Lookup(), [(ids.int(), y)]) == "fused"


def test_a_table_that_is_looked_up_twice():
    class Twice(Lookup):
        def forward(self, ids):
            return self.last(self.table(ids) * self.table(ids.flip(1)))

    assert route(Twice(), [batch(N, T), batch(2, 3)]) == "fused"


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 0.5}], ids=str)
def test_what_the_rule_does_not_cover_goes_another_way(options):
    model = Lookup(**options)
    if "max_norm" in options:  # looking a row up changes it: let there be nothing to change
        nn.init.uniform_(model.table.weight, -0.1, 0.1)
    assert route(model, [batch(N, T)]) != "fused"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_table(dtype):
    model = Lookup().to(dtype)
    ids, y = batch(N, T)
    assert route(model, [(ids, y.to(dtype))], dtype=dtype) == "fused"
