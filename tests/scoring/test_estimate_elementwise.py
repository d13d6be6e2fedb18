"""Parameters that activations are multiplied with, added to or joined with: exact in one pass."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import estimate_fisher
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.problems import (
    TOKENS,
    bert,
    class_loss,
    classes,
    language,
    llama,
    lora,
    next_token_loss,
    opt,
)
from tests.support.tolerances import assert_scores_match

N, T, H = 4, 5, 3

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")]


def noisy(model):
    """Adapters away from their start, where scales are one and half of the gradients are zero."""
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.2 * torch.randn_like(param))
    return model


def ia3(model=None, targets=("key", "value", "output.dense"), inputs=("output.dense",)):
    config = peft.IA3Config(target_modules=list(targets), feedforward_modules=list(inputs))
    return noisy(peft.get_peft_model(bert() if model is None else model, config))


def vera():
    return noisy(
        peft.get_peft_model(bert(), peft.VeraConfig(r=4, target_modules=["query", "value"]))
    )


def dora():
    return noisy(lora(bert(), ["query", "value"], use_dora=True))


def batches():
    """Of several lengths, the last of one sample."""
    return [classes(), classes(3, TOKENS + 2), classes(1)]


def assert_fused(scores, *kinds):
    """All of it, and there is something of each kind."""
    assert set(scores.routes.values()) == {"fused"}
    for kind in kinds:
        assert any(kind in name and score.count_nonzero() for name, score in scores.items())


# PEFT's.

ADAPTERS = {
    "IA3": (ia3, ["key.ia3_l", "output.dense.ia3_l"]),
    "DoRA": (dora, ["magnitude", "lora_A", "lora_B"]),
    "VeRA": (vera, ["vera_lambda_b", "vera_lambda_d"]),
}


@pytest.fixture(params=ADAPTERS)
def adapter(request):
    make, kinds = ADAPTERS[request.param]
    return make(), kinds


def test_adapters(adapter):
    model, kinds = adapter
    assert_fused(assert_exact(model, batches(), class_loss), *kinds)


def test_adapters_scored_from_one_sample_on(adapter):
    model, kinds = adapter
    assert_fused(assert_exact(model, batches()[::-1], class_loss, verify=0), *kinds)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_under_checkpointing(adapter, reentrant):
    model, kinds = adapter
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_fused(assert_exact(model, batches(), class_loss), *kinds)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_adapters_in_bfloat16(adapter, autocast):
    model, kinds = adapter
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # Under autocast plain autograd rounds as much, with weights in float32.
        narrow = torch.float32 if autocast else torch.bfloat16
        scores = assert_exact(model, [classes()], class_loss, dtype=narrow)
    assert_fused(scores, *kinds)


def test_expected_labels(adapter):
    """Several backward passes over one forward: ``sum_c p_c (grad log p_c)^2``."""
    model, kinds = adapter
    batch = classes()
    scores = estimate_fisher(model, [batch], labels="expected", progress=False)
    assert_fused(scores, *kinds)

    def loss_of(label):
        def loss(model, batch):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            log_p = model(**inputs).logits.log_softmax(-1)[:, label]
            return (log_p.detach().exp().sqrt() * log_p).sum()

        return loss

    each = [fisher_oracle(model, [batch], loss_of(label), list(scores)) for label in range(3)]
    assert_scores_match(scores, {name: sum(part[name] for part in each) for name in scores})


def test_two_adapters_in_one_scale():
    model = ia3()
    config = model.peft_config["default"]
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    noisy(model)
    assert_fused(assert_exact(model, batches(), class_loss), "default", "second")


def test_samples_and_tokens_on_one_axis():
    model = ia3(opt(), ["k_proj", "v_proj", "fc2"], ["fc2"])
    scores = assert_exact(model, [language(), language(3, TOKENS + 1)], next_token_loss)
    assert_fused(scores, "fc2.ia3_l", "k_proj.ia3_l")


def test_packed_samples():
    model = ia3(llama(use_cache=False), ["k_proj", "v_proj", "down_proj"], ["down_proj"])
    lengths = (5, 3, 4)
    ids = torch.randint(2, 50, (1, sum(lengths)))
    labels = ids.clone()
    labels[0, [0, 5, 8]] = -100  # not predicted from the sample before
    packed = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "sample_ids": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None],
        "labels": labels,
    }
    apart = [
        {"input_ids": part, "labels": part, "position_ids": torch.arange(part.shape[1])[None]}
        for part in ids.split(lengths, 1)
    ]
    scores = estimate_fisher(model, [packed], progress=False)
    assert_fused(scores, "ia3_l")
    truth = fisher_oracle(model, apart, next_token_loss, list(scores))
    assert_scores_match(scores, truth)


# As many entries as samples, where a scale meets no activation but a constant.


def test_as_many_ranks_as_samples():
    config = peft.DeloraConfig(r=N, target_modules=["query", "value"], init_weights=False)
    model = noisy(peft.get_peft_model(bert(), config))
    assert_exact(model, [classes(N), classes(N, TOKENS + 1)], class_loss)


# Models of images.


def images(n=N):
    return {"pixel_values": torch.randn(n, 3, 8, 8), "labels": torch.randint(3, (n,))}


def image_loss(model, batch):
    logits = model(pixel_values=batch["pixel_values"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="sum")


SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4, "num_labels": 3},
}


def vit():
    config = transformers.ViTConfig(intermediate_size=32, **SMALL)
    return transformers.ViTForImageClassification(config)


def dinov2():
    config = transformers.Dinov2Config(mlp_ratio=2, layerscale_value=0.5, **SMALL)
    return transformers.Dinov2ForImageClassification(config)


@pytest.mark.parametrize("first", [N, 1])
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (vit, ["cls_token", "position_embeddings"]),
        (dinov2, ["cls_token", "position_embeddings", "lambda1"]),
    ],
)
def test_class_tokens_position_embeddings_and_layer_scales(make, kinds, first):
    model, data = make(), [images(first), images(N - 1), images(1)]
    own = [f"*{kind}" for kind in kinds]
    assert_fused(assert_exact(model, data, image_loss, params=own), *kinds)
    scores = assert_exact(model, data, image_loss)  # their activations need a gradient, too
    for name in scores:
        if any(kind in name for kind in kinds):
            assert scores.routes[name] == "fused"


# Modules of one's own.


class Model(nn.Module):
    """``last(compute(first(x)))``, with parameters p and q of a shape."""

    def __init__(self, compute, *shape):
        super().__init__()
        self.first, self.last = nn.Linear(H, H), nn.Linear(H, H)
        self.p, self.q = (nn.Parameter(torch.rand(shape) + 0.5) for _ in "pq")
        self.compute = compute

    def forward(self, x):
        return self.last(self.compute(self, self.first(x)))


def tokens(n=N, t=T):
    return torch.randn(n, t, H), torch.randn(n, t, H)


def twice(m, x):
    return (x * m.p).tanh() * m.p + m.q


OWN = {
    "scale and shift": (lambda m, x: x * m.p + m.q, (H,)),
    "used twice": (twice, (H,)),
    "row": (lambda m, x: m.p * x / m.q, (1, H)),
    "column": (lambda m, x: x * m.p.flatten() - m.q.flatten(), (H, 1)),
    "a token's own": (lambda m, x: x * m.p + m.q, (T, H)),
    "scalar": (lambda m, x: x * m.p + m.q, ()),
    "gate": (lambda m, x: x + m.p.tanh() * x.sin() * m.q.sigmoid(), (1,)),
    "in place": (lambda m, x: (x + 1).mul_(m.p).add_(m.q), (H,)),
    "drawn into one": (lambda m, x: x * (m.p * m.q).softmax(-1), (H,)),
    "joined": (lambda m, x: torch.cat((m.p.expand(len(x), -1, -1), x * m.q), 1)[:, :-1], (1, 1, H)),
}


@pytest.mark.parametrize("trained", ["all", "p and q"])
@pytest.mark.parametrize("case", OWN)
def test_modules_of_ones_own(case, trained):
    compute, shape = OWN[case]
    model = Model(compute, *shape)
    params = None if trained == "all" else ["p", "q"]
    t = [T] * 3 if case == "a token's own" else [T, N, T + 1]
    data = [tokens(N, t[0]), tokens(3, t[1]), tokens(1, t[2])]
    assert_fused(assert_exact(model, data, params=params), "p", "q")


MIXED = {
    "also in a matrix product": lambda m, x: (x * m.p[0]) @ m.p * m.q[0],
    "a matrix product of what it was made of": lambda m, x: x @ (m.p * 2) * m.p.sum() * m.q[1],
    "past the module": lambda m, x: x * m.p[0] * m._parameters["p"][1] * m.q[0],
    "in a function of one's own": lambda m, x: x * m.p[0] * Reversed.apply(m.p)[1] * m.q[0],
}


class Reversed(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize("verify", [0, 2])
@pytest.mark.parametrize("case", MIXED)
def test_one_use_that_is_not_elementwise(case, verify):
    scores = assert_exact(Model(MIXED[case], H, H), [tokens(), tokens(H), tokens()], verify=verify)
    assert scores.routes["p"] != "fused"
    assert scores.routes["q"] == "fused"


def test_a_penalty_in_the_loss():
    """It meets the losses themselves, [N]."""

    def loss_fn(model, batch):
        return squared_error(model, batch) + 0.1 * model.p.square().sum()

    model = Model(lambda m, x: x * m.p, H)
    assert_fused(assert_exact(model, [tokens(), tokens(1)], loss_fn=loss_fn, params=["p"]), "p")


class Scale(nn.Module):
    """Nothing but a scale, of the shape that a single sample's activations have."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.rand(1, T, H))

    def forward(self, x):
        return x * self.p


@pytest.mark.parametrize("sizes", [(N, 2), (1, N)])
def test_nothing_but_a_scale(sizes):
    assert_fused(assert_exact(Scale(), [tokens(n) for n in sizes]), "p")


def test_a_scale_that_two_modules_share():
    model = nn.Sequential(Scale(), nn.Tanh(), Scale())
    model[2].p = model[0].p
    assert_fused(assert_exact(model, [tokens(), tokens(2)]), "0.p")


class Interrupted(Exception):
    pass


def test_the_model_is_as_before_after_an_exception():
    model = ia3()
    before = {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}

    def loss_fn(model, batch):
        scale = model.base_model.model.bert.encoder.layer[0].attention.self.key.ia3_l
        assert type(scale) is not nn.ParameterDict  # else this would show nothing
        raise Interrupted

    with pytest.raises(Interrupted):
        estimate_fisher(model, [classes()], loss_fn=loss_fn, progress=False)
    assert before == {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}
