"""Norms whose weight is by channel: in groups, by sample and channel, with running averages."""

import pytest
import torch
from torch import nn

from fishkern import FisherVerificationError, estimate_fisher
from fishkern.interception import rule_for
from tests.support.images import C, N, O, assert_fused, conv2d, images, net
from tests.support.oracle import assert_exact, squared_error
from tests.support.tolerances import assert_matches

CONVS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SIZES = ((), (9,), (7, 6), (5, 4, 3))  # of images of so many dimensions


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 6), (9,), ()], ids=str)
def test_group_norm(groups, size):
    if size:
        conv = CONVS[len(size)]
        model = net(conv(C, 6, 1), nn.GroupNorm(groups, 6), nn.Tanh(), conv(6, 6, 3), size=size)
    else:
        model = nn.Sequential(nn.Linear(C, 6), nn.GroupNorm(groups, 6, eps=0.1), nn.Linear(6, O))
        for param in model[1].parameters():
            nn.init.uniform_(param, 0.5, 1.5)
    assert_fused(assert_exact(model, [images(size=size), images(2, size)]))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm(dims):
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    conv, size = CONVS[dims], (5, 4, 3)[:dims]
    layers = [conv(C, 6, 1), norm(6, affine=True), nn.Tanh(), conv(6, 6, 2)]
    assert_fused(assert_exact(net(*layers, size=size), [images(size=size)]))


def seen(model, *inputs):
    """The model after some training batches: its averages are no longer as they were made."""
    with torch.no_grad():
        for x in inputs:
            model.train()(x * 3 + 1)
    return model


def test_instance_norm_with_running_averages_goes_another_way():
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = seen(net(conv2d(), norm, nn.Tanh()), images()[0])
    scores = assert_exact(model, [images()])
    assert scores.routes["body.1.weight"] == "vmap"
    assert scores.routes["body.0.weight"] == "fused"


NORMS = {
    "tokens in one axis": (nn.BatchNorm1d, ()),
    "1d": (nn.BatchNorm1d, SIZES[1]),
    "2d": (nn.BatchNorm2d, SIZES[2]),
    "3d": (nn.BatchNorm3d, SIZES[3]),
    "sync": (nn.SyncBatchNorm, SIZES[2]),
}


class Tokens(nn.Module):
    """[N, T, C]; the norm sees all tokens in one axis."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(C, 6), norm, nn.Tanh())
        self.last = nn.Linear(6, O)
        for param in norm.parameters():
            nn.init.uniform_(param, 0.5, 1.5)

    def forward(self, x):
        return self.last(self.body(x.flatten(0, -2))).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm(name, eps):
    cls, size = NORMS[name]
    norm = cls(6, eps=eps)
    if size:
        conv = CONVS[len(size)]
        model = net(conv(C, 6, 1), norm.eval(), nn.Tanh(), conv(6, 6, 2), size=size)
        batches = [images(size=size), images(2, size)]
    else:
        model = Tokens(norm)
        batches = [(torch.randn(n, t, C), torch.randn(n, t, O)) for n, t in ((N, 5), (2, 3))]
    if cls is nn.SyncBatchNorm:  # in training it wants several GPUs
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    else:
        seen(model, *(x for x, _ in batches))
    assert_fused(assert_exact(model, batches))


def test_batch_norm_in_training_is_scored_with_its_averages_and_put_back():
    model = seen(net(conv2d(), nn.BatchNorm2d(6), nn.Tanh()), images()[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = images()
    found = estimate_fisher(model.train(), [batch], loss_fn=squared_error, progress=False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert found == estimate_fisher(model.eval(), [batch], loss_fn=squared_error, progress=False)


@pytest.mark.parametrize("params", ["*.weight", "*.bias"])
def test_one_parameter_of_a_batch_norm(params):
    model = seen(net(conv2d(), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), images()[0])
    assert_fused(assert_exact(model, [images()], params=params))


def test_batch_norm_without_parameters_is_passed_through():
    model = seen(net(conv2d(), nn.BatchNorm2d(6, affine=False), nn.Tanh()), images()[0])
    assert_fused(assert_exact(model, [images()]))


def test_an_average_far_from_zero():
    """Not ``x w - mean w``: either term may be a thousand times their difference."""
    norm = nn.BatchNorm2d(C).eval()
    nn.init.constant_(norm.running_mean, 1000.0)
    x, grad_out = torch.randn(N, 1, C, 7, 6) + 1000, torch.randn(N, 1, C, 7, 6)
    found = rule_for(norm).sample_grads(norm, x, grad_out)["weight"]
    x_hat = (x.double() - 1000) / (1 + norm.eps) ** 0.5
    assert_matches(found, (x_hat * grad_out).sum((1, 3, 4)), terms=7 * 6)


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_in_other_dtypes_and_memory_formats(dtype, format):
    model = seen(net(conv2d(padding=1), nn.BatchNorm2d(6), nn.SiLU(), conv2d(in_channels=6)))
    model.to(dtype, memory_format=format)
    x, y = (t.to(dtype) for t in images())
    batch = x.contiguous(memory_format=format), y

    def loss_fn(model, batch):
        return squared_error(model, batch).to(next(model.parameters()).dtype)

    assert_fused(assert_exact(model, [batch], loss_fn=loss_fn, dtype=dtype))


def test_batch_norm_under_autocast():
    """The convolution's narrow output meets weights and averages in float32."""
    model = seen(net(conv2d(padding=1), nn.BatchNorm2d(6), nn.SiLU(), conv2d(in_channels=6)))

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return squared_error(model, batch)

    scores = estimate_fisher(model, [images()], loss_fn=loss_fn, progress=False)
    assert_fused(scores)


# With the statistics of a batch, samples have no gradients of their own.


class TrainsItsNorm(nn.Module):
    """Puts a norm into training mode itself, whatever scoring has put it into."""

    def __init__(self):
        super().__init__()
        self.net = net(conv2d(), nn.BatchNorm2d(6), nn.Tanh())

    def forward(self, x):
        self.net.body[1].train()
        return self.net(x)


MIXED = {
    "no averages": lambda: net(conv2d(), nn.BatchNorm2d(6, track_running_stats=False), nn.Tanh()),
    "in training": TrainsItsNorm,
}


@pytest.mark.parametrize("name", MIXED)
def test_batches_that_a_norm_mixes_are_refused(name):
    with pytest.raises(FisherVerificationError, match="samples depend on each other"):
        estimate_fisher(MIXED[name](), [images()], loss_fn=squared_error, progress=False)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("verify", [0, 2])
def test_a_sample_alone_is_scored_by_its_own_statistics(name, verify):
    assert_exact(MIXED[name](), [images(1), images(1)], verify=verify)
