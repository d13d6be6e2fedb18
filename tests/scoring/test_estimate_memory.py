"""Scoring takes the scores and next to nothing else, whatever the numbers of samples and tokens.

Counted are the bytes that torch's allocator hands out, which are the same each time.
"""

import pytest
import torch
import transformers
from torch import nn

from benchmarks.cases.scoring import fishkern_scores
from benchmarks.cases.scoring_memory import gradients_dropped, layer_bytes
from benchmarks.memory import allocated_peak
from benchmarks.workloads.scoring import CLASSES, Task, Work
from fishkern import _dispatch
from fishkern.functional import embedding_fisher_, norm_fisher_
from tests.support.problems import lora

SHAPES = [(8, 32), (32, 32), (8, 128)]  # samples, tokens
HIDDEN, VOCAB = 64, 500


@pytest.fixture(params=["native", "reference"])
def kernels(request):
    reason = _dispatch.why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with _dispatch.use_backend(request.param):
        yield request.param


def ids(n, t):
    return torch.randint(1, VOCAB, (n, t))


def bert(n, t, adapt=False):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * HIDDEN,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    model = lora(model, ["query", "value"]) if adapt else model
    batch = {"input_ids": ids(n, t), "labels": torch.randint(2, (n,))}
    return Work(model.eval(), [batch], CLASSES)


def llama(n, t):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * HIDDEN,
        tie_word_embeddings=False,
    )
    task = Task(
        lambda model, batch: model(input_ids=batch["input_ids"]).logits.transpose(1, 2),
        nn.CrossEntropyLoss,
    )
    batch = {"input_ids": ids(n, t), "labels": ids(n, t)}
    return Work(transformers.LlamaForCausalLM(config).eval(), [batch], task)


def extra(work):
    """Bytes beyond an ordinary pass whose gradients are dropped; bytes of the scores."""
    peaks = []
    for build in (fishkern_scores, gradients_dropped):
        run = build(work)
        run()  # what is made once and kept does not count
        peaks.append(allocated_peak(run))
    return peaks[0] - peaks[1], 4 * sum(p.numel() for p in work.candidates().values())


def test_the_count_is_exact():
    def copies():
        x = torch.ones(100_000)
        y = x.clone() + 1  # three at once
        return y.sum()

    assert 1_200_000 <= allocated_peak(copies) <= 1_200_000 + 1024
    assert allocated_peak(copies) == allocated_peak(copies)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", [bert, llama])
def test_every_weight_takes_the_scores_alone(kernels, model, shape):
    work = model(*shape)
    beyond, scores = extra(work)
    # Plain torch makes one sample's gradient of one layer, and its square.
    buffers = 0 if kernels == "native" else 2 * 4 * HIDDEN * 4 * HIDDEN
    assert beyond <= 1.1 * scores + buffers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_takes_less_than_a_copy_of_a_layers_input(kernels, shape):
    work = bert(*shape, adapt=True)
    beyond, scores = extra(work)
    one_input = 4 * shape[0] * shape[1] * HIDDEN
    assert beyond <= 1.1 * scores + one_input / 2
    assert one_input < layer_bytes(work)


@pytest.mark.parametrize("shape", [(8, 32), (32, 128)], ids=str)
def test_rows_and_scales_are_squared_without_a_copy_of_their_input(shape):
    if reason := _dispatch.why_not("native"):
        pytest.skip(f"native: {reason}")
    grad_out, x_hat = torch.randn(*shape, HIDDEN), torch.randn(*shape, HIDDEN)
    tokens, fisher = ids(*shape), torch.zeros(VOCAB, HIDDEN)
    weight, bias = torch.zeros(HIDDEN), torch.zeros(HIDDEN)
    for run in (
        lambda: embedding_fisher_(fisher, tokens, grad_out, padding_idx=0),
        lambda: norm_fisher_(weight, bias, x_hat, grad_out),
    ):
        run()
        assert allocated_peak(run) < 1024
