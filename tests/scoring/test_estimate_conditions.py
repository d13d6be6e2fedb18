"""Checkpointing, narrow dtypes, autocast, wrappers, other kinds of batches, several processes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern import estimate_fisher
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.problems import (
    PROBLEMS,
    TOKENS,
    gpt2,
    language,
    llama,
    lora,
    next_token_loss,
    opt,
)
from tests.support.processes import process_group, two_processes
from tests.support.tolerances import assert_scores_match

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning"),
]

N, T, I = 4, 5, 3  # samples, tokens, features  # noqa: E741


def score(model, batches, **kwargs):
    return estimate_fisher(model, batches, progress=False, **kwargs)


def count_calls(module):
    """How often the module runs, over both passes, in the list's length."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


# Checkpointing: transformers skips it in eval mode, and dropout must be off all the same.


def layers(model):
    return model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, opt])
def test_checkpointing_recomputes_without_dropout(make, reentrant):
    model = make(attention_dropout=0.5, **({"dropout": 0.5} if make is opt else {}))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    batch = language()
    calls = count_calls(layers(model)[0].self_attn.q_proj)
    score(model, [batch], verify=0, params="*q_proj.weight")
    # the batch, the one-sample probe of its shapes, the batch again in the backward pass
    assert len(calls) == 3
    layers(model)[0].self_attn.q_proj._forward_hooks.clear()
    assert_exact(model, [batch, language(2, 4)], next_token_loss)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert-lora", "gpt2", "llama-tied", "t5"])
def test_checkpointing_is_exact(name, reentrant):
    problem = PROBLEMS[name]
    model = problem.model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_exact(model, [problem.batch(), problem.batch(2, 4)], problem.loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("params", ["*layers.1*q_proj*", "*norm*", "*down_proj.weight"])
def test_checkpointing_below_which_nothing_else_is_a_candidate(params, reentrant):
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    scores = assert_exact(model, [language()], next_token_loss, params=params)
    assert all(score.count_nonzero() for score in scores.values())


class Segments(nn.Module):
    """One layer in two segments, and where asked for a functional use in another."""

    def __init__(self, reentrant, functional):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(I, I), nn.Linear(I, I), nn.Linear(I, I)
        self.reentrant, self.functional = reentrant, functional

    def forward(self, x):
        x = self.first(x)
        for part in (self.layer, self.other, self.layer):
            x = checkpoint(part, x, use_reentrant=self.reentrant).tanh()
        return self.last(x)

    def other(self, x):
        return F.linear(x, self.layer.weight) if self.functional else x.sin()


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_in_two_checkpointed_segments(reentrant, functional, verify):
    batches = [(torch.randn(n, T, I), torch.randn(n, T, I)) for n in (N, 3)]
    model = Segments(reentrant, functional)
    scores = score(model, batches, loss_fn=squared_error, verify=verify)
    model.reentrant = False  # the oracle asks for gradients of chosen tensors
    truth = fisher_oracle(model, batches, lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)
    assert scores.routes["layer.weight"] == ("loop" if functional else "fused")


class AlwaysDropping(nn.Module):
    """Checkpointed layer with functional dropout and attention's own, on in training mode."""

    gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.qkv, self.last = nn.Linear(I, 3 * I), nn.Linear(I, I)

    def attend(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        p = 0.5 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, None, p)
        y = y + F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        y = torch.dropout(F.dropout(y.squeeze(1), 0.5, self.training), 0.5, self.training)
        return F.dropout(input=y, p=0.5, training=self.training)

    def forward(self, x):
        if not self.training:
            return self.last(self.attend(x))
        return self.last(checkpoint(self.attend, x, use_reentrant=False))


def test_functional_dropout_is_the_identity_where_layers_stay_in_training_mode():
    model = AlwaysDropping().train()
    calls = count_calls(model.qkv)
    batch = torch.randn(N, T, I), torch.randn(N, T, I)
    score(model, [batch], loss_fn=squared_error, verify=0)
    assert len(calls) == 3
    model.qkv._forward_hooks.clear()
    assert_exact(model, [batch])


# Narrow dtypes: the error may be twice that of one-sample autograd in the same dtype.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert-lora", "gpt2", "llama-tied", "llama-untied"])
def test_narrow_weights(name, dtype):
    problem = PROBLEMS[name]
    model = problem.model().to(dtype)
    scores = assert_exact(model, [problem.batch(8)], problem.loss, dtype=dtype)
    assert {score.dtype for score in scores.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "bert-lora", "gpt2", "llama-tied"])
def test_autocast(name, dtype):
    problem = PROBLEMS[name]
    model, batches = problem.model(), [problem.batch(5), problem.batch(3, 4)]
    with torch.autocast("cpu", dtype=dtype):
        scores = score(model, batches)
        rounded = fisher_oracle(model, batches, problem.loss, list(scores), torch.float32)
    truth = fisher_oracle(model, batches, problem.loss, list(scores))
    assert_scores_match(scores, truth, rounded)


@pytest.mark.parametrize("verify", [0, 2])
def test_autocast_in_float16_that_overflows(verify):
    layers = nn.Sequential(nn.Linear(I, I), nn.Tanh(), nn.Linear(I, I))
    batch = torch.randn(N, T, I), torch.full((N, T, I), 1e5)  # more than float16 has
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(RuntimeError, match=r"overflowed or are NaN: score in float32 or bfloat16"),
    ):
        score(layers, [batch], loss_fn=squared_error, verify=verify)


def test_a_default_dtype_is_not_that_of_the_scores():
    problem = PROBLEMS["bert-lora"]
    model, batch = problem.model(), problem.batch()
    torch.set_default_dtype(torch.bfloat16)
    try:
        scores = score(model, [batch])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_scores_match(scores, fisher_oracle(model, [batch], problem.loss, list(scores)))


def test_frozen_base_weights_in_a_narrower_dtype():
    problem = PROBLEMS["bert-lora"]
    model = problem.model()
    for name, param in model.named_parameters():
        if "lora" not in name:
            param.data = param.data.to(torch.bfloat16)
    batch = problem.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score(model, [batch])
        rounded = fisher_oracle(model, [batch], problem.loss, list(scores), torch.float32)
    truth = fisher_oracle(model, [batch], problem.loss, list(scores))
    assert_scores_match(scores, truth, rounded)


def test_a_model_in_float64():
    problem = PROBLEMS["gpt2"]
    scores = assert_exact(problem.model().double(), [problem.batch()], problem.loss)
    assert {score.dtype for score in scores.values()} == {torch.float32}


# Inputs without a sample axis.


@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (TOKENS - 1, TOKENS)])
def test_a_relative_bias_where_there_are_as_many_samples_as_tokens(shape):
    problem = PROBLEMS["t5"]  # the decoder has a token less than the encoder
    scores = assert_exact(problem.model(), [problem.batch(*shape)], problem.loss)
    biases = {name: route for name, route in scores.routes.items() if "relative" in name}
    assert len(biases) == 2
    assert "fused" not in biases.values()


# Candidates.


def test_patterns_choose_among_frozen_parameters():
    model = llama().requires_grad_(False)
    patterns = ["*q_proj*", "model.norm.weight"]
    scores = assert_exact(model, [language()], next_token_loss, params=patterns)
    assert len(scores) == 3
    assert not any(param.requires_grad for param in model.parameters())


def test_a_predicate_chooses():
    model = llama()

    def is_wide(name, param):
        return "mlp" in name and param.shape[0] > 16

    scores = assert_exact(model, [language()], next_token_loss, params=is_wide)
    assert len(scores) == 4


def test_an_unused_parameter_has_zeros():
    model = nn.ModuleDict({"used": nn.Linear(I, I), "unused": nn.Linear(I, 2)})

    def loss_fn(model, batch):
        return squared_error(model["used"], batch)

    batch = torch.randn(N, I), torch.randn(N, I)
    scores = assert_exact(model, [batch], loss_fn=loss_fn)
    assert scores["unused.weight"].shape == (2, I)
    assert not any(score.count_nonzero() for name, score in scores.items() if "unused" in name)


def test_scores_on_the_host():
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch()
    scores = score(model, [batch], score_device="cpu")
    assert {s.device.type for s in scores.values()} == {"cpu"}
    assert scores == score(model, [batch])


def test_without_gradients_enabled():
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch()
    with torch.no_grad():
        scores = score(model, [batch])
        assert not torch.is_grad_enabled()
    assert scores == score(model, [batch])


# Batches that only loss_fn can read, or cut.


@dataclass
class Opaque:
    x: torch.Tensor
    y: torch.Tensor


def opaque_loss(model, batch):
    return squared_error(model, (batch.x, batch.y))


def test_opaque_batches_are_exact():
    model = nn.Sequential(nn.Linear(I, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    batches = [(torch.randn(n, T, I), torch.randn(n, T, 2)) for n in (N, 1, 3)]
    scores = score(model, [Opaque(*batch) for batch in batches], loss_fn=opaque_loss)
    truth = fisher_oracle(model, batches, lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)
    assert scores.num_samples == N + 4


@pytest.mark.parametrize("texts", [tuple, list])
def test_texts_beside_tensors(texts):
    model = nn.Linear(I, 2)

    def loss_fn(model, batch):
        x = torch.stack([torch.full((I,), float(len(text))) for text in batch[0]])
        return squared_error(model, (x.to(batch[1].dtype), batch[1]))

    y = torch.randn(3, 2)
    scores = score(model, [(texts(["a", "bb", "ccc"]), y)], loss_fn=loss_fn)
    x = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, I)
    truth = fisher_oracle(model, [(x, y)], lambda *a: squared_error(*a).sum(), list(scores))
    assert_scores_match(scores, truth)


def test_num_samples_of_tuples_may_end_on_a_boundary():
    model = nn.Linear(I, 2)
    batches = [(torch.randn(3, I), torch.randn(3, 2)) for _ in range(3)]
    scores = score(model, batches, loss_fn=squared_error, num_samples=6)
    assert scores == score(model, batches[:2], loss_fn=squared_error)


# Wrappers and processes.


def test_a_compiled_model_is_looked_through():
    problem = PROBLEMS["bert-lora"]
    model, batch = problem.model(), problem.batch()
    assert score(torch.compile(model), [batch]) == score(model, [batch])


def test_checkpoint_wrappers_do_not_show_in_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(I, I), nn.Tanh(), nn.Linear(I, 2))
    model = nn.Sequential(checkpoint_wrapper(plain[0]), *plain[1:])
    batch = torch.randn(N, T, I), torch.randn(N, T, 2)
    scores = score(model, [batch], loss_fn=squared_error)
    assert list(scores) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert scores.routes["0.weight"] == "fused"
    assert_scores_match(
        scores, fisher_oracle(plain, [batch], lambda *a: squared_error(*a).sum(), list(scores))
    )


def test_a_model_in_ddp_is_looked_through(tmp_path):
    problem = PROBLEMS["bert"]
    model, batch = problem.model(), problem.batch()
    plain = score(model, [batch])
    with process_group(0, 1, tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert score(wrapped, [batch]) == plain
        loss = wrapped(**batch).loss  # DDP still works
        loss.backward()
    assert model.classifier.weight.grad is not None


def shard(rank, path, model, batches):
    scores = score(
        model,
        [batches[rank]],
        process_group=torch.distributed.group.WORLD,
        params="*",
        sample_scores=True,
    )
    scores.save(path / f"{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one_with_all_the_data(tmp_path):
    from fishkern import FisherDiagonal

    model = lora(gpt2(), ["c_attn"], fan_in_fan_out=True)
    batches = [language(3, 4), language(2, 6)]  # ranks with unequal numbers of samples
    two_processes(shard, tmp_path, model, batches)
    parts = [FisherDiagonal.load(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert parts[0].num_samples == 5
    assert parts[0] == parts[1]
    alone = [score(model, [part], params="*", sample_scores=True) for part in batches]
    torch.testing.assert_close(
        parts[0].sample_scores, torch.cat([each.sample_scores for each in alone])
    )
    assert_scores_match(parts[0], fisher_oracle(model, batches, next_token_loss, list(parts[0])))
