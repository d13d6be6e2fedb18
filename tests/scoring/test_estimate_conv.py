"""Convolutions: exact in one pass, whatever their settings and wherever their samples are."""

import pytest
import torch
from torch import nn

from fishkern import estimate_fisher
from fishkern.interception import rule_for
from fishkern.scoring.passes import Scoring
from fishkern.scoring.sample_scores import SampleScores
from tests.support.images import C, N, O, Twice, assert_fused, conv2d, images, net
from tests.support.oracle import assert_exact, squared_error
from tests.support.tolerances import SCORE
from tests.support.training import random_mask

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


# Sums by sample.


def test_sums_by_sample():
    """As the squares of every sample alone, over a mask."""
    layers = [conv2d(groups=2), nn.GroupNorm(2, 6), nn.Tanh(), conv2d(in_channels=6)]
    model = net(*layers, nn.BatchNorm2d(6)).eval()
    candidates = dict(model.named_parameters())
    mask = random_mask(model, density=0.3)
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
    torch.testing.assert_close(by_sample.result(), torch.stack(expected), rtol=SCORE, atol=0)
