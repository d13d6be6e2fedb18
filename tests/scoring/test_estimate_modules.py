"""Modules that per-sample scoring gets wrong elsewhere: each exact here, by whatever route."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import estimate_fisher
from fishkern.scoring.accumulator import FisherAccumulator
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.problems import bert, class_loss, classes, lora
from tests.support.tolerances import assert_scores_match

N, T, I, O = 4, 5, 3, 2  # samples, tokens, input and output features  # noqa: E741


def tokens(n=N, t=T, o=O):
    return torch.randn(n, t, I), torch.randn(n, t, o)


class Model(nn.Module):
    """A small model from its modules and its forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.compute(self, x)


def hidden(**modules):
    return {"first": nn.Linear(I, I), **modules, "last": nn.Linear(I, O)}


# Uses that no rule sees: the parameters go the slow way, the others do not.


def test_a_functional_use_goes_by_the_loop():
    model = Model(lambda m, x: F.linear(m.first(x), m.last.weight), **hidden())
    scores = assert_exact(model, [tokens()])
    assert scores.routes["last.weight"] == "loop"
    assert scores.routes["first.weight"] == "fused"
    assert scores["last.bias"].count_nonzero() == 0  # took no part


def test_a_functional_use_beside_the_module_itself():
    model = Model(lambda m, x: m.last(F.linear(m.first(x), m.first.weight)), **hidden())
    scores = assert_exact(model, [tokens(), tokens(2, 7)])
    assert scores.routes["first.weight"] == "loop"
    assert scores.routes["first.bias"] == "fused"  # only the weight has another use


def test_an_embedding_used_functionally():
    model = Model(
        lambda m, x: F.linear(m.first(m.emb(x)), m.emb.weight), emb=nn.Embedding(7, I), **hidden()
    )
    batch = torch.randint(7, (N, T)), torch.randn(N, T, 7)
    assert assert_exact(model, [batch]).routes["emb.weight"] == "loop"


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_tied_to_an_embedding(bias):
    model = Model(
        lambda m, x: m.head(m.first(m.emb(x))),
        emb=nn.Embedding(7, I),
        first=nn.Linear(I, I),
        head=nn.Linear(I, 7, bias=bias),
    )
    model.head.weight = model.emb.weight
    batch = torch.randint(7, (N, T)), torch.randn(N, T, 7)
    scores = assert_exact(model, [batch])
    assert "head.weight" not in scores  # once, by its first name


def test_a_parameter_of_the_model_itself():
    model = Model(lambda m, x: m.last(m.first(x) * m.gain), **hidden())
    model.gain = nn.Parameter(torch.randn(I))
    scores = assert_exact(model, [tokens()])
    assert (scores.routes["gain"], scores.routes["first.weight"]) == ("fused", "fused")


def test_a_use_in_a_later_batch_only():
    def forward(m, x):
        y = m.last(m.first(x))
        return y if x.shape[1] < 6 else y + F.linear(x, m.last.weight)

    batches = [tokens(t=5), tokens(t=6), tokens(t=5)]
    assert_exact(Model(forward, **hidden()), batches)


def test_a_module_used_in_a_later_batch_only():
    def forward(m, x):
        y = m.first(x)
        return m.last(y if x.shape[1] < 6 else m.middle(y))

    model = Model(forward, **hidden(middle=nn.Linear(I, I)))
    assert_exact(model, [tokens(t=5), tokens(t=6)])


# Several uses of one weight: squared after their sum.


def test_a_weight_tied_between_two_linears():
    model = Model(
        lambda m, x: m.last(m.second(m.first(x).tanh())), **hidden(second=nn.Linear(I, I))
    )
    model.second.weight = model.first.weight
    scores = assert_exact(model, [tokens(), tokens(3, 2)])
    assert scores.routes["first.weight"] == "fused"


def test_a_bias_tied_between_two_linears():
    model = Model(
        lambda m, x: m.last(m.second(m.first(x).tanh())), **hidden(second=nn.Linear(I, I))
    )
    model.second.bias = model.first.bias
    assert_exact(model, [tokens()])


def test_a_bias_tied_to_the_weight_of_a_norm():
    model = Model(lambda m, x: m.last(m.norm(m.first(x))), **hidden(norm=nn.LayerNorm(I)))
    model.norm.weight = model.first.bias
    assert_exact(model, [tokens()])


@pytest.mark.parametrize("uses", [2, 3])
def test_a_module_called_more_than_once(uses):
    def forward(m, x):
        for _ in range(uses):
            x = m.first(x).tanh()
        return m.last(x)

    assert assert_exact(Model(forward, **hidden()), [tokens()]).routes["first.weight"] == "fused"


def test_a_module_called_with_and_without_tokens():
    model = Model(lambda m, x: m.last(m.first(x) + m.first(x.sum(1)).unsqueeze(1)), **hidden())
    assert_exact(model, [tokens()])


def test_a_call_without_gradient_beside_one_with():
    def forward(m, x):
        with torch.no_grad():
            scale = m.first(x)
        return m.last(m.first(x) * scale + m.first(x).detach())

    assert assert_exact(Model(forward, **hidden()), [tokens()]).routes["first.weight"] == "fused"


def test_a_frozen_weight_with_a_trained_bias_and_the_reverse():
    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    model.first.weight.requires_grad_(False)
    model.last.bias.requires_grad_(False)
    assert list(assert_exact(model, [tokens()])) == ["first.bias", "last.weight"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_dora():
    model = lora(bert(), ["query", "value"], use_dora=True)
    scores = assert_exact(model, [classes()], class_loss)
    assert any("magnitude" in name for name in scores)


@pytest.mark.parametrize("segments", [False, True])
def test_a_use_without_a_gradient_is_waited_for_in_checkpointed_segments_alone(
    monkeypatch, segments
):
    """As DoRA uses its matrices: what is held otherwise would be so to the end of the pass."""

    def forward(m, x):
        size = torch.linalg.norm(m.first(torch.eye(I, dtype=x.dtype))).detach()
        return m.last(m.first(x) / size)

    def checkpointed(m, x):
        return checkpoint(forward, m, x.requires_grad_(), use_reentrant=True)

    held, end = [], FisherAccumulator.end_backward

    def noted(accumulator):
        held.append("first.weight" in accumulator.uses)
        end(accumulator)

    monkeypatch.setattr(FisherAccumulator, "end_backward", noted)
    model, batch = Model(checkpointed if segments else forward, **hidden()), tokens()
    scores = estimate_fisher(model, [batch], loss_fn=squared_error, verify=0, progress=False)
    assert held == [segments]
    model.compute = forward
    truth = fisher_oracle(model, [batch], lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


# Calls that the rule does not describe.


def test_a_module_called_with_keywords():
    model = Model(lambda m, x: m.last(input=m.first(x)), **hidden())
    assert assert_exact(model, [tokens()]).routes["last.weight"] != "fused"


def test_a_replaced_forward_of_one_instance():
    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    forward = model.first.forward
    model.first.forward = lambda x: 2 * forward(x)
    scores = estimate_fisher(model, [tokens()], loss_fn=squared_error, progress=False)
    assert scores.routes["first.weight"] != "fused"
    assert "forward" in model.first.__dict__
    del model.first.forward
    # a copy of the model cannot carry the closure along: compare with the same model written out
    batch = tokens()
    twin = Model(lambda m, x: m.last(2 * m.first(x)), **hidden())
    twin.load_state_dict(model.state_dict())
    model.first.forward = lambda x: 2 * forward(x)
    kwargs = {"loss_fn": squared_error, "progress": False}
    assert estimate_fisher(model, [batch], **kwargs).keys() == scores.keys()
    for name, score in estimate_fisher(twin, [batch], **kwargs).items():
        torch.testing.assert_close(estimate_fisher(model, [batch], **kwargs)[name], score)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def test_a_subclass_has_no_rule_of_its_parent():
    model = Model(lambda m, x: m.last(m.first(x)), first=Doubled(I, I), last=nn.Linear(I, O))
    assert assert_exact(model, [tokens()]).routes["first.weight"] != "fused"


def test_a_weight_made_by_a_parametrization():
    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    nn.utils.parametrizations.weight_norm(model.first)
    kwargs = {"loss_fn": squared_error, "progress": False}
    scores = estimate_fisher(model, [tokens()], **kwargs)
    assert scores.routes["first.parametrizations.weight.original0"] != "fused"


def test_a_pruned_weight_is_made_by_a_hook():
    from torch.nn.utils import prune

    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    prune.l1_unstructured(model.first, "weight", 3)
    mask, batch = model.first.weight_mask.clone(), tokens()
    kwargs = {"loss_fn": squared_error, "progress": False}
    scores = estimate_fisher(model, [batch], **kwargs)
    prune.remove(model.first, "weight")
    plain = estimate_fisher(model, [batch], **kwargs)
    torch.testing.assert_close(scores["first.weight_orig"], plain["first.weight"] * mask)
    torch.testing.assert_close(scores["first.bias"], plain["first.bias"])


def test_attention_of_torch_reads_its_weights_functionally():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Model(lambda m, x: m.layer(x), layer=layer)
    assert_exact(model, [(torch.randn(N, T, 4), torch.randn(N, T, 4))])


# Where the samples are.


def test_an_input_that_all_samples_share():
    def forward(m, x):
        table = torch.linspace(-1, 1, x.shape[1] * I).to(x).view(1, x.shape[1], I)
        return m.last(x + m.first(table))

    for n in (N, T):
        scores = assert_exact(Model(forward, **hidden()), [tokens(n)])
        assert scores.routes["first.weight"] != "fused"


@pytest.mark.parametrize("n", [1, N, T])
def test_an_input_without_any_sample_axis(n):
    def forward(m, x):
        table = torch.linspace(-1, 1, x.shape[1] * I).to(x).view(x.shape[1], I)
        return m.last(x + m.first(table))

    assert_exact(Model(forward, **hidden()), [tokens(n), tokens(2)])


@pytest.mark.parametrize("n", [1, N, T])
def test_samples_in_the_second_dimension(n):
    model = Model(lambda m, x: m.last(m.first(x.transpose(0, 1))).transpose(0, 1), **hidden())
    scores = assert_exact(model, [tokens(n), tokens(2, 7), tokens(3, 1)])
    if n != 1:
        assert scores.routes["first.weight"] == "fused"


@pytest.mark.parametrize("n", [1, N, T])
def test_samples_and_tokens_in_one_dimension(n):
    def forward(m, x):
        return m.last(m.first(x.flatten(0, 1))).view(*x.shape[:2], O)

    scores = assert_exact(Model(forward, **hidden()), [tokens(n), tokens(2, 7), tokens(3, 1)])
    if n != 1:
        assert scores.routes["first.weight"] == "fused"


def test_a_first_batch_of_single_tokens_in_one_dimension():
    def forward(m, x):
        return m.last(m.first(x.flatten(0, 1))).view(*x.shape[:2], O)

    assert_exact(Model(forward, **hidden()), [tokens(t=1), tokens(t=6), tokens(2, 2)])


def test_several_token_dimensions():
    x, y = torch.randn(N, 2, 3, 4, I), torch.randn(N, 2, 3, 4, O)
    scores = assert_exact(Model(lambda m, x: m.last(m.first(x)), **hidden()), [(x, y)])
    assert set(scores.routes.values()) == {"fused"}


def test_no_token_dimension():
    batch = torch.randn(N, I), torch.randn(N, O)
    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    assert set(assert_exact(model, [batch]).routes.values()) == {"fused"}


def test_the_sample_as_a_plain_vector():
    batch = torch.randn(1, I), torch.randn(1, O)
    model = Model(lambda m, x: m.last(m.first(x[0])).unsqueeze(0), **hidden())
    assert_exact(model, [batch])


def test_an_order_of_samples_of_the_models_own():
    model = Model(lambda m, x: m.last(m.first(x.flip(0)) + m.first(x).flip(0)).flip(0), **hidden())
    assert set(assert_exact(model, [tokens()]).routes.values()) == {"loop"}


def test_tokens_before_samples_in_one_dimension_are_not_taken_for_the_reverse():
    def forward(m, x):
        rows = m.last(m.first(x.transpose(0, 1).flatten(0, 1)))
        return rows.view(x.shape[1], x.shape[0], O).transpose(0, 1)

    scores = assert_exact(Model(forward, **hidden()), [tokens()])
    assert set(scores.routes.values()) == {"loop"}


# Memory formats and in-place changes.


def test_a_gradient_of_stride_zero():
    def loss_fn(model, batch):
        return model(batch[0]).flatten(1).sum(1)

    model = Model(lambda m, x: m.last(m.first(x)), **hidden())
    for x in (
        torch.randn(N, T, I),
        torch.randn(N, 1, I).expand(N, T, I),
        torch.randn(I, T, N).permute(2, 1, 0),
    ):
        assert_exact(model, [(x, torch.zeros(N))], loss_fn=loss_fn)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(N,), (N, T)])
def test_an_activation_in_place_after_the_layer(conv1d, shape):
    from transformers.pytorch_utils import Conv1D

    first = Conv1D(I, I) if conv1d else nn.Linear(I, I)
    model = Model(lambda m, x: m.last(F.relu(m.first(x), inplace=True)), **hidden())
    model.first = first
    batch = torch.randn(*shape, I), torch.randn(*shape, O)
    scores = assert_exact(model, [batch])
    assert scores.routes["first.weight"] == "fused"


def test_a_module_that_is_called_under_two_paths():
    shared = nn.Linear(I, I)
    model = Model(lambda m, x: m.last(m.second(m.first(x).tanh())), first=shared, second=shared)
    model.last = nn.Linear(I, O)
    scores = assert_exact(model, [tokens()])
    assert list(scores) == ["first.weight", "first.bias", "last.weight", "last.bias"]


def test_a_sparse_gradient():
    emb = nn.Embedding(7, I, sparse=True)
    model = Model(lambda m, x: m.last(m.first(m.emb(x))), emb=emb, **hidden())
    assert_exact(model, [(torch.randint(7, (N, T)), torch.randn(N, T, O))])
