"""Families beside those of ``PROBLEMS``, and LoRA on all of them; experts that tokens are sent to.

Their every parameter, and LoRA's, against float64; all fused but what is named.
"""

import copy
from fnmatch import fnmatchcase

import peft
import pytest
import torch
import transformers

from fishkern import estimate_fisher
from tests.support.oracle import assert_exact, fisher_oracle
from tests.support.problems import (
    GENERATE,
    SAMPLES,
    VOCAB,
    Problem,
    class_loss,
    classes,
    decoder_loss,
    language,
    llama,
    lora,
    next_token_loss,
    opt,
    quiet,
    sequences,
    t5,
)
from tests.support.tolerances import assert_scores_match

WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
WIDTHS |= {"num_attention_heads": 2}


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=34, num_labels=3, **WIDTHS
    )
    return transformers.RobertaForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **WIDTHS)
    return transformers.ViTForImageClassification(config)


def pictures(n=SAMPLES, t=None):
    return {"pixel_values": torch.randn(n, 3, 16, 16), "labels": torch.randint(3, (n,))}


def adapted(make, targets):
    return lambda: lora(make(), targets)


FAMILIES = {
    "roberta": Problem(quiet(roberta), classes, class_loss),
    "vit": Problem(quiet(vit), pictures, class_loss),
    "roberta-lora": Problem(adapted(roberta, ["query", "value"]), classes, class_loss),
    "vit-lora": Problem(adapted(vit, ["q_proj", "v_proj"]), pictures, class_loss),
    "llama-lora": Problem(adapted(llama, "all-linear"), language, next_token_loss),
    "opt-lora": Problem(adapted(opt, ["q_proj", "v_proj", "fc1"]), language, next_token_loss),
    "t5-lora": Problem(adapted(t5, ["q", "v", "wi"]), sequences, decoder_loss),
}
# What belongs to all samples, and what has no rule.
SLOWER = {"vit": ("*.cls_token", "*.position_embeddings", "*.patch_embeddings.projection.*")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    problem = FAMILIES[family]
    scores = assert_exact(problem.model(), [problem.batch(), problem.batch(6, 6)], problem.loss)
    slower = SLOWER.get(family, ())
    for name, route in scores.routes.items():
        if not any(fnmatchcase(name, pattern) for pattern in slower):
            assert route == "fused", name


# Mixtures of experts: 3-D weights, and lists of tokens that were sent to each.


def mixtral(**config):
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_local_experts=4, **_experts(), **config)
    )


def olmoe(**config):
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(num_experts=4, **_experts(), **config)
    )


def _experts():
    lengths = {"vocab_size": VOCAB, "max_position_embeddings": 64}
    return {**WIDTHS, **lengths, **GENERATE, "num_key_value_heads": 1, "num_experts_per_tok": 2}


def experts_lora(model):
    config = {"target_modules": [], "r": 2, "init_lora_weights": False}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_parameters=targets, **config))


MIXTURES = {"mixtral": mixtral, "olmoe": olmoe}
TRAINED = {
    "all": lambda model: model,
    "lora": lambda model: lora(model, ["q_proj", "v_proj"]),
    "lora on experts": experts_lora,
}


def exact_mixture(model, batches):
    """The oracle takes one expert after the other: grouped products know no float64."""
    scores = estimate_fisher(model, batches, progress=False)
    twin = copy.deepcopy(model)
    twin.config._experts_implementation = "eager"
    assert_scores_match(scores, fisher_oracle(twin, batches, next_token_loss, list(scores)))
    return scores


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_of_experts(mixture, trained):
    model = TRAINED[trained](MIXTURES[mixture]())
    scores = exact_mixture(model, [language(), language(6, 6)])
    for name, route in scores.routes.items():
        if "mlp" not in name:
            assert route == "fused", name
        assert scores[name].count_nonzero(), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_of_running_experts(implementation):
    model = mixtral()
    model.set_experts_implementation(implementation)
    exact_mixture(model, [language(), language(2, 9)])


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_as_many_tokens_at_an_expert_as_would_fit_the_batch(samples):
    """Each sample has as many tokens as experts, so that equal shares come about by chance."""
    model = mixtral(tie_word_embeddings=True)
    exact_mixture(model, [language(samples, 4), language(samples, 8)])
