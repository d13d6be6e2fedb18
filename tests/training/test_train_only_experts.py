"""train_only on mixtures of experts: weights of three dimensions, experts without a token."""

import copy

import pytest
import torch
import transformers

from fishkern import SparseMask, train_only
from tests.support.problems import GENERATE, VOCAB, Problem, language, next_token_loss
from tests.support.tolerances import assert_scores_match
from tests.support.training import dense_gradients, leaf_gradients, random_mask
from tests.training.test_train_only_inputs import column_mask

PROBLEM = Problem(None, language, next_token_loss)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    **GENERATE,
}


def mixtral():
    config = transformers.MixtralConfig(num_local_experts=8, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen():
    config = transformers.Qwen2MoeConfig(
        num_experts=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, **SIZES
    )
    return transformers.Qwen2MoeForCausalLM(config)


def one_expert(model):
    """Some entries of one expert alone."""
    name, weight = next((n, p) for n, p in model.named_parameters() if p.dim() == 3)
    first = 7 * weight[0].numel()
    return SparseMask({name: torch.arange(first, first + 40, 8)}, {name: weight.shape})


def implemented(model, experts):
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("this version of transformers has one implementation of experts")
    model.set_experts_implementation(experts)
    return model


@pytest.mark.parametrize("make_mask", [random_mask, column_mask, one_expert])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("make", [mixtral, qwen])
def test_gradients_of_experts_are_the_dense_ones(make, experts, make_mask):
    torch.manual_seed(1)
    model = implemented(make().eval(), experts)
    mask, batches = make_mask(model), [language(3, 5), language(1, 2)]
    plain = implemented(copy.deepcopy(model), "eager")  # the other one knows no float64
    truth = [dense_gradients(plain, PROBLEM, batch, torch.float64) for batch in batches]
    train_only(model, mask, unlisted="freeze")
    for batch in batches:
        next_token_loss(model, batch).backward()
    found = leaf_gradients(model)
    expected = {
        name: sum(dense[name].flatten()[mask[name].long()] for dense in truth) for name in found
    }
    assert_scores_match(found, expected)
