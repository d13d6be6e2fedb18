"""Models with convolutions, adapters on them, and weights made of others (weight_norm)."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import estimate_fisher
from tests.support.images import N, O, assert_fused, conv2d, images, net
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.tolerances import assert_scores_match


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=12,
            patch_size=4,
            num_labels=O,
        )
    )


def wav2vec2(**config):
    return transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(3, 2),
            conv_kernel=(5, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_labels=O,
            **config,
        )
    )


def class_loss(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")


def pictures(n=N):
    return {"pixel_values": torch.randn(n, 3, 12, 12), "labels": torch.randint(O, (n,))}


def test_vit():
    scores = assert_exact(vit(), [pictures(), pictures(2)], class_loss)
    loop = {name for name, route in scores.routes.items() if route == "loop"}
    assert loop <= {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert scores["vit.embeddings.patch_embeddings.projection.weight"].all()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_wav2vec2(norm):
    """Its position embedding has a weight made by weight_norm: no rule, but exact."""
    model = wav2vec2(feat_extract_norm=norm, conv_bias=norm == "layer")
    batch = {"input_values": torch.randn(N, 60), "labels": torch.randint(O, (N,))}
    scores = assert_exact(model, [batch], class_loss)
    loop = {name for name, route in scores.routes.items() if route == "loop"}
    assert {name for name in loop if "pos_conv_embed" not in name} <= {"wav2vec2.masked_spec_embed"}
    assert any("parametrizations.weight.original0" in name for name in loop)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("hooks", [True, False])
def test_weight_norm_goes_another_way(hooks):
    make = nn.utils.weight_norm if hooks else nn.utils.parametrizations.weight_norm
    model = net(conv2d(), nn.Tanh(), conv2d(in_channels=6))
    x, y = images()
    batch = [(x, y)]
    plain = fisher_oracle(model, batch, lambda m, b: squared_error(m, b).sum(), ["body.0.bias"])
    make(model.body[0])
    scores = estimate_fisher(model, batch, loss_fn=squared_error, progress=False)
    normed = {route for name, route in scores.routes.items() if name.startswith("body.0.")}
    assert normed <= {"vmap", "loop"}
    assert scores.routes["body.2.weight"] == "fused"
    assert_scores_match({"bias": scores["body.0.bias"]}, {"bias": plain["body.0.bias"]})


def lora(**config):
    base = net(conv2d(padding=1, stride=2), nn.GroupNorm(2, 6), nn.Tanh(), conv2d(in_channels=6))
    targets = ["body.0", "body.3"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_lora(config):
    scores = assert_exact(lora(**config), [images(), images(2)])
    assert_fused(scores)
    assert sum("lora_A" in name for name in scores) == 2
    assert all(score.any() for score in scores.values())


def test_dora():
    scores = assert_exact(lora(use_dora=True), [images()])
    assert any("magnitude" in name for name in scores)
