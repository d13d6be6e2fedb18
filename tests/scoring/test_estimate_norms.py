"""Norms: by a rule wherever a class computes what the rule says, and exact in any case."""

import copy
import importlib
import inspect

import pytest
import torch
import transformers
from torch import nn

from fishkern.interception import rule_for
from tests.support.oracle import assert_exact

N, T, I, C = 4, 5, 3, 16  # samples, tokens, inputs, features of the norm  # noqa: E741

MODELS = """
bert bloom chameleon clip cohere cohere2 convnext deepseek_v2 deepseek_v3 falcon falcon_mamba gemma
gemma2 gemma3 gemma3n glm glm4 gpt2 gpt_neox gpt_oss granite granitemoe idefics2 jamba jetmoe llama
llama4 mamba mamba2 mistral mixtral mllama mobilebert modernbert mpt mt5 nemotron olmo olmo2 olmoe
opt phi phi3 phimoe pixtral poolformer qwen2 qwen2_5_vl qwen2_moe qwen3 qwen3_moe qwen3_next roberta
sam smollm3 stablelm t5 udop umt5 videoprism vit zamba2
""".split()  # noqa: SIM905

# These compute something else: their parameters go by another route.
OTHERS = {
    "NoNorm",  # of MobileBERT: a scale and a shift, without a norm
    "PoolFormerGroupNorm",
    "Qwen3NextRMSNormGated",
}


def norm_classes(model):
    """``(name, class)`` of a model's own norms that can be made from their size alone."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if (
            cls.__module__ == module.__name__
            and name.removesuffix("Gated").removesuffix("1P").endswith(("Norm", "LayerNorm"))
            and issubclass(cls, nn.Module)
            and not issubclass(cls, transformers.PreTrainedModel)
            and sum(
                p.default is p.empty for p in list(inspect.signature(cls).parameters.values())[1:]
            )
            == 0
        ):
            yield name, cls


class Between(nn.Module):
    """A norm between two linear layers, its parameters drawn at random."""

    def __init__(self, norm, shape=(C,)):
        super().__init__()
        self.first, self.norm = nn.Linear(I, shape.numel()), norm
        self.last, self.shape = nn.Linear(shape.numel(), 2), shape
        for param in norm.parameters():
            nn.init.uniform_(param, 0.5, 1.5)

    def forward(self, x):
        y = self.norm(self.first(x).unflatten(-1, self.shape))
        return self.last(y.flatten(-len(self.shape)))


def check(norm, shape=(C,)):
    """The scores are exact; which way those of the norm went."""
    model = Between(norm, torch.Size(shape))
    batches = [(torch.randn(n, t, I), torch.randn(n, t, 2)) for n, t in ((N, T), (2, 1))]
    scores = assert_exact(model, batches)
    assert all(scores[name].any() for name in scores)
    return {scores.routes[name] for name in scores if name.startswith("norm.")}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("model", MODELS)
def test_norms_of_transformers(model):
    for name, cls in norm_classes(model):
        if name == "ChameleonLayerNorm":  # takes a shape of several dimensions
            continue
        norm = cls(C)
        if not list(norm.parameters()):
            continue
        if name in OTHERS:
            assert rule_for(norm) is None or "GroupNorm" in name, name
        else:
            assert check(norm) == {"fused"}, name


def test_the_list_of_models_finds_many_norms():
    found = [name for model in MODELS for name, _ in norm_classes(model)]
    assert len(found) > 40
    assert {"LlamaRMSNorm", "T5LayerNorm", "CohereLayerNorm", "NemotronLayerNorm1P"} <= set(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(C,), (2, 8)])
def test_layer_norm_of_torch(shape, bias):
    assert check(nn.LayerNorm(shape, bias=bias), shape) == {"fused"}


@pytest.mark.parametrize("shape", [(C,), (2, 8)])
def test_rms_norm_of_torch(shape):
    assert check(nn.RMSNorm(shape), shape) == {"fused"}


def test_a_norm_with_a_weight_by_head():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    assert check(CohereLayerNorm((2, 8)), (2, 8)) == {"fused"}


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_norm_of_which_one_parameter_is_scored(frozen):
    norm = nn.LayerNorm(C)
    getattr(norm, frozen).requires_grad_(False)
    assert check(norm) == {"fused"}


class Affine(nn.Module):
    """What a rule for norms may take it for, if it is called so."""

    def __init__(self, compute, **buffers):
        super().__init__()
        self.weight, self.compute = nn.Parameter(torch.ones(C)), compute
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x):
        return self.compute(self, x)


class OwnRMSNorm(Affine):
    pass


def normalised(x, dim=-1):
    return x / (x.square().mean(dim, keepdim=True) + 1e-6).sqrt()


NORMS = {
    "plain": lambda m, x: normalised(x) * m.weight,
    "one is added": lambda m, x: normalised(x) * (1 + m.weight),
    "no norm, a scale": lambda m, x: x * m.weight,
}
NO_NORMS = {
    "the weight is squared": lambda m, x: normalised(x) * m.weight**2,
    "a half is added": lambda m, x: normalised(x) * (0.5 + m.weight),
    "the weight is normalised": lambda m, x: normalised(x * m.weight),
    "a constant is added": lambda m, x: normalised(x) * m.weight + 1,
    "features are mixed": lambda m, x: normalised(x) * m.weight.flip(0),
    "tokens are mixed": lambda m, x: normalised(x, (-1, -2)) * m.weight,
    "the weight is by token": lambda m, x: normalised(x) * m.weight[: x.shape[-2], None],
}


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_is_found_by_what_it_computes(case):
    assert check(OwnRMSNorm(NORMS[case])) == {"fused"}


@pytest.mark.parametrize("case", NO_NORMS)
def test_what_is_only_called_a_norm_is_not_taken_for_one(case):
    norm = OwnRMSNorm(NO_NORMS[case])
    before = copy.deepcopy(norm.state_dict())
    assert rule_for(norm) is None
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))
    check(norm)  # exact, by whatever route


def test_samples_that_are_mixed_are_refused():
    norm = OwnRMSNorm(lambda m, x: normalised(x, 0) * m.weight)
    assert rule_for(norm) is None


def test_a_norm_that_keeps_averages_is_not_tried():
    def compute(module, x):
        module.average += 1
        return normalised(x) * module.weight

    norm = OwnRMSNorm(compute, average=torch.zeros(()))
    assert rule_for(norm) is None
    assert norm.average == 0


def test_a_norm_that_takes_channels_first_is_not_taken_for_one():
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    assert rule_for(ConvNextLayerNorm(C)) is not None
    assert rule_for(ConvNextLayerNorm(C, data_format="channels_first")) is None


def test_a_name_alone_makes_no_norm():
    class RMSNormLike(nn.Linear):
        pass

    assert rule_for(RMSNormLike(C, C)) is None
    assert rule_for(Affine(NORMS["plain"])) is None  # nobody says that it is one
