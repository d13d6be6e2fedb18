"""Convolutions and the norms between them: exact in one pass, for scoring and for training."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import SparseMask, attached, estimate_fisher, train_only
from fishkern.interception import rule_for
from tests.support.oracle import assert_exact, fisher_oracle, squared_error
from tests.support.tolerances import assert_scores_match

N, C, O = 4, 4, 3  # samples, channels, outputs of the model  # noqa: E741


class Net(nn.Module):
    """A few convolutional layers, positions averaged, a linear layer."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.last = nn.LazyLinear(O)

    def forward(self, x):
        return self.last(self.body(x).flatten(2).mean(2))


def net(*layers, size=(7, 6), channels=C):
    """The model with its lazy layer made, and no bias or scale as it was initialised."""
    model = Net(*layers)
    model(torch.zeros(1, channels, *size))
    for param in model.parameters():
        if param.dim() == 1:
            nn.init.uniform_(param, 0.5, 1.5)
    return model


def images(n=N, size=(7, 6), channels=C):
    return torch.randn(n, channels, *size), torch.randn(n, O)


def assert_fused(scores):
    assert set(scores.routes.values()) == {"fused"}, scores.routes


PADDING = [
    {"padding": 1},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1)},  # more on one side
    *(
        {"padding": padding, "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
        for padding in ((2, 1), "same")
    ),
]
SETTINGS = [
    *PADDING,
    {"stride": (2, 3)},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": (0, 1)},
    {"groups": 4, "out_channels": 8},
    {"groups": 4, "out_channels": 4, "stride": 2},
    {"bias": False},
]


def conv2d(**settings):
    return nn.Conv2d(**{"in_channels": C, "out_channels": 6, "kernel_size": 3, **settings})


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_a_convolution(settings):
    conv = conv2d(**settings)
    model = net(conv2d(out_channels=C, padding=1), nn.Tanh(), conv, nn.ReLU(inplace=True))
    assert_fused(assert_exact(model, [images(), images(2, (9, 8))]))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_other_dimensions(dims, mode):
    cls, size = {1: nn.Conv1d, 3: nn.Conv3d}[dims], (9, 5, 4)[:dims]
    layers = [
        cls(C, 6, 3, padding=1, padding_mode=mode, groups=2),
        nn.GELU(),
        cls(6, 5, 2, stride=2),
    ]
    assert_fused(assert_exact(net(*layers, size=size), [images(size=size)]))


@pytest.mark.parametrize("settings", PADDING, ids=str)
def test_input_gradient_through_padding(settings):
    """Of the layer before: what it gets is what its convolution's successor passes down."""
    conv, x = conv2d(**settings), torch.randn(2, C, 7, 6, requires_grad=True)
    y = conv(x)
    grad_out = torch.randn_like(y)
    rule = rule_for(conv)
    expected = torch.autograd.grad(y, (x, *conv.parameters()), grad_out)
    found = rule.input_grad(conv, x.detach(), grad_out)
    torch.testing.assert_close(found, expected[0])
    for name, grad in zip(("weight", "bias"), expected[1:], strict=True):
        torch.testing.assert_close(rule.param_grad(conv, name, x.detach(), grad_out), grad)
        each = rule.sample_grads(conv, x.detach()[:, None], grad_out[:, None])[name]
        torch.testing.assert_close(each.sum(0), grad)


# Where samples are, and where they are not.


class Frames(nn.Module):
    """Sound [N, L] as one channel; a convolution of one sample has no sample axis at all."""

    def __init__(self, unbatched):
        super().__init__()
        self.unbatched, self.conv, self.last = unbatched, nn.Conv1d(1, C, 3), nn.Linear(C, O)

    def forward(self, x):
        if self.unbatched:
            y = torch.stack([self.conv(sound[None]) for sound in x])
        else:
            y = self.conv(x[:, None])
        return self.last(y.tanh().mean(2))


def test_sound():
    sound = [(torch.randn(n, 9), torch.randn(n, O)) for n in (N, 2)]
    assert_fused(assert_exact(Frames(unbatched=False), sound))


def test_an_input_without_a_sample_axis():
    """[C, L] at C = N must not be read as samples; a batch of one is one."""
    scores = assert_exact(Frames(unbatched=True), [(torch.randn(N, 9), torch.randn(N, O))])
    assert scores.routes["conv.weight"] == "loop"
    model = Frames(unbatched=True)
    assert_fused(assert_exact(model, [(torch.randn(1, 9), torch.randn(1, O))] * 2))


class Samples(nn.Module):
    """Each row of [N, L] is a channel of one unbatched input, each channel convolved alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.conv = nn.Conv1d(N, N, 3, padding=1, groups=N)
        self.last = nn.Linear(5, O)

    def forward(self, x):
        if len(x) < N:
            x = torch.cat([x, x.new_zeros(N - len(x), 5)])
            return self.last(self.conv(self.first(x)))[:1]
        return self.last(self.conv(self.first(x)))


def test_samples_as_channels_are_not_taken_for_one_sample():
    batch = torch.randn(N, 5), torch.randn(N, O)
    scores = estimate_fisher(
        Samples(), [batch], loss_fn=squared_error, params=["conv.*"], verify=0, progress=False
    )
    assert set(scores.routes.values()) == {"loop"}


def test_frames_that_a_model_flattens():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(conv2d(padding=1), nn.Tanh(), nn.GroupNorm(2, 6))

        def forward(self, x):
            y = self.net(x.flatten(0, 1))
            return y.unflatten(0, x.shape[:2]).mean(1)

    batches = [(torch.randn(n, t, C, 7, 6), torch.randn(n, O)) for n, t in ((N, 3), (2, 5))]
    assert_fused(assert_exact(Video(), batches))


# Several uses of one weight.


class Twice(nn.Module):
    def __init__(self, shrink, **tied):
        super().__init__()
        self.shrink = shrink
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.other = nn.Conv2d(C, C, 3, **{"padding": 1, **tied})
        self.other.weight = self.conv.weight
        self.norm, self.last = nn.GroupNorm(2, C), nn.Linear(C, O)

    def forward(self, x):
        y = self.norm(self.conv(x)).tanh()
        y = F.avg_pool2d(y, 2) if self.shrink else y
        y = self.norm(self.conv(y)).tanh()
        return self.last(self.other(y).flatten(2).mean(2))


def test_a_convolution_called_twice_and_tied():
    assert_fused(assert_exact(Twice(shrink=False), [images(), images(3, (5, 5))]))


@pytest.mark.parametrize(
    "tied", [{"padding": 0}, {"stride": 2}, {"padding_mode": "reflect"}, {"dilation": 2}], ids=str
)
def test_a_weight_tied_between_convolutions_of_other_settings(tied):
    scores = assert_exact(Twice(shrink=False, **tied), [images()])
    assert set(scores.routes.values()) == {"fused"}


def test_a_convolution_of_images_of_two_sizes():
    scores = assert_exact(Twice(shrink=True), [images()])
    assert set(scores.routes.values()) == {"fused"}


# Norms.


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 6), (9,), ()], ids=str)
def test_group_norm(groups, size):
    if size:
        conv = nn.Conv2d if len(size) == 2 else nn.Conv1d
        model = net(conv(C, 6, 1), nn.GroupNorm(groups, 6), nn.Tanh(), conv(6, 6, 3), size=size)
    else:
        model = nn.Sequential(nn.Linear(C, 6), nn.GroupNorm(groups, 6, eps=0.1), nn.Linear(6, O))
        for param in model[1].parameters():
            nn.init.uniform_(param, 0.5, 1.5)
    assert_fused(assert_exact(model, [images(size=size), images(2, size)]))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm(dims):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    size = (5, 4, 3)[:dims]
    layers = [conv(C, 6, 1), norm(6, affine=True), nn.Tanh(), conv(6, 6, 2)]
    assert_fused(assert_exact(net(*layers, size=size), [images(size=size)]))


def test_norms_with_running_averages_go_another_way():
    layers = [
        conv2d(),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.BatchNorm2d(6),
    ]
    model = net(*layers)
    with torch.no_grad():
        model(images()[0])
    scores = assert_exact(model, [images()])
    assert {scores.routes[f"body.{i}.weight"] for i in (1, 3)} == {"vmap"}
    assert scores.routes["body.0.weight"] == "fused"


# Other dtypes and memory formats.


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_formats(format):
    model = net(conv2d(padding=1), nn.GroupNorm(3, 6), nn.SiLU(), conv2d(in_channels=6, groups=2))
    x, y = images()
    batch = x.contiguous(memory_format=format), y
    assert_fused(assert_exact(model.to(memory_format=format), [batch]))


def test_autocast():
    model = net(conv2d(padding=1), nn.GroupNorm(3, 6), nn.SiLU(), conv2d(in_channels=6))

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return squared_error(model, batch)

    scores = estimate_fisher(model, [images()], loss_fn=loss_fn, progress=False)
    assert_fused(scores)


def test_bfloat16_weights():
    model = net(conv2d(padding=1), nn.GroupNorm(3, 6), nn.SiLU(), conv2d(in_channels=6))
    batch = tuple(t.bfloat16() for t in images())

    def loss_fn(model, batch):
        return squared_error(model, batch).to(next(model.parameters()).dtype)

    scores = assert_exact(model.bfloat16(), [batch], loss_fn=loss_fn, dtype=torch.bfloat16)
    assert_fused(scores)


# Models.


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


# Sums by sample, and training.


def test_sums_by_sample():
    """As the squares of every sample alone, over a mask."""
    from fishkern.scoring.passes import Scoring
    from fishkern.scoring.sample_scores import SampleScores

    model = net(conv2d(groups=2), nn.GroupNorm(2, 6), nn.Tanh(), conv2d(in_channels=6)).eval()
    candidates = dict(model.named_parameters())
    mask = random_mask(model)
    x, y = images()
    by_sample = SampleScores(mask)
    scoring = Scoring(model, candidates, squared_error, None, by_sample=by_sample)
    scoring.add((x, y), None)
    model.zero_grad()
    assert set(scoring.routes().values()) == {"fused"}
    expected = []
    for n in range(N):
        grads = torch.autograd.grad(
            squared_error(model, (x[n : n + 1], y[n : n + 1])).sum(),
            [p.requires_grad_() for p in candidates.values()],
        )
        squares = dict(zip(candidates, (g.square().flatten() for g in grads), strict=True))
        expected.append(sum(squares[name][mask[name].long()].sum() for name in mask))
    torch.testing.assert_close(by_sample.result(), torch.stack(expected), rtol=1e-4, atol=0)


def random_mask(model):
    chosen = {n: torch.rand(p.numel()) < 0.3 for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return SparseMask({n: c.nonzero().view(-1) for n, c in chosen.items()}, shapes)


TRAINED = {
    "settings": lambda: net(
        conv2d(padding=1, groups=2),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        conv2d(in_channels=6, padding=1, padding_mode="reflect"),
        nn.SiLU(),  # a bias right before such a norm has a gradient of zero
        nn.InstanceNorm2d(6, affine=True),
        conv2d(in_channels=6, kernel_size=2, padding="same"),
        nn.SiLU(),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
    ),
    "twice": lambda: Twice(shrink=True, padding=0),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("training", [True, False])
def test_train_only_gives_exact_leaf_gradients(name, training):
    model = TRAINED[name]().train(training)
    batch, mask = images(), random_mask(model)

    def dense(dtype):
        twin = copy.deepcopy(model).to(dtype)
        squared_error(twin, tuple(t.to(dtype) for t in batch)).sum().backward()
        grads = {n: p.grad.flatten() for n, p in twin.named_parameters()}
        return {n: grads[n][mask[n].long()] for n in mask if len(mask[n])}

    truth, rounded = dense(torch.float64), dense(torch.float32)
    train_only(model, mask)
    squared_error(model, batch).sum().backward()
    found = {
        n.replace("fishkern_leaves.", ""): leaf.grad
        for n, leaf in attached(model).named_parameters()
    }
    assert_scores_match(found, truth, rounded)


def test_train_only_of_an_unbatched_input():
    conv = conv2d(padding="same", padding_mode="circular")
    x, mask = torch.randn(C, 7, 6, requires_grad=True), random_mask(conv)
    expected = torch.autograd.grad(conv(x).square().sum(), (x, conv.weight, conv.bias))
    train_only(conv, mask)
    conv(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    leaves = dict(attached(conv).named_parameters())
    for name, grad in zip(("weight", "bias"), expected[1:], strict=True):
        found = leaves[f"fishkern_leaves.{name}"].grad
        torch.testing.assert_close(found, grad.flatten()[mask[name].long()])
