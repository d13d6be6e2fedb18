"""Named small models: how to make one, a batch for it, and its samples' losses, summed.

The losses are written here a second time, in their plainest form, so that the default losses of
the package are tested against something. Everything is a function: collecting tests makes no
model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn

VOCAB, SAMPLES, TOKENS = 50, 4, 6


@dataclass(frozen=True)
class Problem:
    """``batch(num_samples, num_tokens)``; ``loss(model, batch)`` sums over the samples."""

    model: Callable[[], nn.Module]
    batch: Callable[..., Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    fused: tuple[str, ...] = ()  # parts of names whose scores must come from the fused route
    kwargs: dict[str, Any] = field(default_factory=dict)  # for estimate_fisher


def ids(n, t):
    return torch.randint(2, VOCAB, (n, t))


def padding(n, t, side="right"):
    """An attention mask [n, t]; sample i has i % 3 pads, the first has none."""
    mask = torch.ones(n, t, dtype=torch.long)
    for i in range(n):
        pads = i % 3
        if pads:
            mask[i, -pads:] = 0
    return mask if side == "right" else mask.flip(1)


def text(n=SAMPLES, t=TOKENS, **labels):
    return {"input_ids": ids(n, t), "attention_mask": padding(n, t), **labels}


def classes(n=SAMPLES, t=TOKENS):
    return text(n, t, labels=torch.randint(0, 3, (n,)))


def targets(n=SAMPLES, t=TOKENS):
    return text(n, t, labels=torch.randn(n))


def language(n=SAMPLES, t=TOKENS, side="right"):
    """Causal: -100 in the labels at pads, at first tokens and in the first sample's prompt.

    (With left padding a pad's output would predict the first token.)
    """
    input_ids, mask = ids(n, t), padding(n, t, side)
    labels = input_ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    labels[0, : t // 2] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
    }


def token_classes(n=SAMPLES, t=TOKENS):
    labels = torch.randint(0, 3, (n, t)).masked_fill(padding(n, t) == 0, -100)
    return text(n, t, labels=labels)


def sequences(n=SAMPLES, t=TOKENS):
    labels = ids(n, t - 1).masked_fill(padding(n, t - 1) == 0, -100)
    return text(n, t, labels=labels)


def choices(n=SAMPLES, t=TOKENS):
    return {"input_ids": ids(n * 3, t).view(n, 3, t), "labels": torch.randint(0, 3, (n,))}


def _inputs(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def class_loss(model, batch):
    return F.cross_entropy(model(**_inputs(batch)).logits, batch["labels"], reduction="sum")


def square_loss(model, batch):
    return 0.5 * (model(**_inputs(batch)).logits[:, 0] - batch["labels"]).square().sum()


def next_token_loss(model, batch):
    logits, labels = model(**_inputs(batch)).logits[:, :-1], batch["labels"][:, 1:]
    return _token_loss(logits, labels)


def token_loss(model, batch):
    return _token_loss(model(**_inputs(batch)).logits, batch["labels"])


def decoder_loss(model, batch):
    return _token_loss(model(**batch).logits, batch["labels"])


def _token_loss(logits, labels):
    return F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")


def quiet(make):
    """Noise on vectors, so that no bias is zero and no norm the identity; dropout as configured."""

    def made():
        model = make()
        for param in model.parameters():
            if param.dim() == 1:
                param.data.add_(0.1 * torch.randn_like(param))
        return model

    return made


def bert(cls=transformers.BertForSequenceClassification, **config):
    config = {"num_labels": 3, **config}
    return cls(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            **config,
        )
    )


def gpt2(**config):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, **GENERATE, **config
        )
    )


def llama(**config):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=64,
            **GENERATE,
            **config,
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def opt(**config):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            **GENERATE,
            **config,
        )
    )


GENERATE = {"bos_token_id": 0, "eos_token_id": 1}


def lora(model, targets, **config):
    """Adapters with B drawn at random: at B = 0 half of all scores would be zero."""
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **config)
    return peft.get_peft_model(model, config)


PROBLEMS = {
    "bert": Problem(quiet(bert), classes, class_loss, ("query.weight", "dense.bias")),
    "bert-lora": Problem(
        lambda: lora(bert(), ["query", "value"]), classes, class_loss, ("lora_A", "lora_B")
    ),
    "bert-regression": Problem(
        quiet(lambda: bert(num_labels=1)), targets, square_loss, ("classifier",)
    ),
    "bert-tokens": Problem(
        quiet(lambda: bert(transformers.BertForTokenClassification)),
        token_classes,
        token_loss,
        ("query.weight", "classifier"),
    ),
    "bert-masked": Problem(  # the head is tied to the embedding, and its bias to itself
        quiet(lambda: bert(transformers.BertForMaskedLM)), token_classes, token_loss
    ),
    "bert-choices": Problem(  # the model flattens [N, 3, T] to [N * 3, T]
        quiet(lambda: bert(transformers.BertForMultipleChoice)), choices, class_loss, ("dense",)
    ),
    "gpt2": Problem(quiet(gpt2), language, next_token_loss, ("c_attn.weight", "c_fc.bias")),
    "gpt2-lora": Problem(
        lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True), language, next_token_loss, ("lora",)
    ),
    "llama-tied": Problem(
        lambda: llama(tie_word_embeddings=True), language, next_token_loss, ("q_proj",)
    ),
    "llama-untied": Problem(llama, language, next_token_loss, ("q_proj", "lm_head")),
    "opt": Problem(quiet(opt), language, next_token_loss, ("q_proj.weight", "fc1.bias")),
    "t5": Problem(t5, sequences, decoder_loss, ("SelfAttention.q.weight",)),
}
