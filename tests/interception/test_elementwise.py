"""Parameters met by activations: what is followed, what is put in, and whose gradient it gets."""

import pytest
import torch
from torch import nn

from fishkern.interception import Site
from fishkern.interception.elementwise import RULE, Tracked, settled, tracked
from tests.support.tolerances import assert_matches

N, T, H = 3, 5, 4


class Module(nn.Module):
    """A parameter ``p`` (and ``q``) of some shape, and what is done with it."""

    def __init__(self, function, *shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.p = nn.Parameter(torch.rand(shape, generator=generator) + 0.5)
        self.q = nn.Parameter(torch.rand(shape, generator=generator) + 0.5)
        self.register_buffer("c", torch.rand(shape, generator=generator) + 0.5)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Collector:
    """A consumer that takes axis 0 for the samples' wherever it is as long as there are samples."""

    def __init__(self, module):
        self.shapes, self.grads, self.strays = [], {}, set()
        self.sites = [Site(module, RULE, {n: n}, None, self.called) for n in ("p", "q")]

    def called(self, site, x):
        self.shapes.append(tuple(x.shape))
        return x

    def consume(self, use, grad_out):
        names = [name for site in use.sites for name in site.names]
        if use.shape[:1] != (N,) or not use.repeats(0):
            self.strays.update(names)
            return
        for name, grad in zip(names, use.sample_grads(grad_out.unsqueeze(1)), strict=True):
            self.grads[name] = self.grads.get(name, 0) + grad


def batch(grad=False):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, T, H, generator=generator).requires_grad_(grad)


def run(module, x):
    """Per-sample gradients as collected, the gradients that were not, and x's own."""
    collector = Collector(module)
    missed = {}
    hooks = [
        param.register_hook(lambda grad, n=name: missed.__setitem__(n, grad))
        for name, param in module.named_parameters()
    ]
    with tracked(collector.sites, collector.consume):
        y = settled(module(x))
        y.sin().sum().backward()
    for hook in hooks:
        hook.remove()
    collector.strays |= {name for name, grad in missed.items() if grad is not None}
    return y, collector


def truth(module, x):
    """Each sample alone, by plain autograd."""
    grads = [
        torch.autograd.grad(
            module(x[n : n + 1]).sin().sum(), [module.p, module.q], allow_unused=True
        )
        for n in range(len(x))
    ]
    return {
        name: torch.stack(each)
        for name, each in zip("pq", zip(*grads, strict=True), strict=True)
        if each[0] is not None
    }


def changed(x, change):
    """A copy of x changed in place."""
    x = x * 1
    change(x)
    return x


def imul(m):
    scale = 1
    scale *= m.p.flatten()
    scale *= m.q.flatten()
    return scale


def through_its_base(m):
    scale = m.p * 1
    view = scale.view(1, -1)
    scale.mul_(m.c)
    return view


def inferred(m):
    with torch.inference_mode():
        return (m.p * 2).view(-1).sum().item()


FOLLOWED = {
    "product": (lambda m, x: x * m.p, (H,)),
    "product, the other way round": (lambda m, x: m.p * x, (1, 1, H)),
    "sum": (lambda m, x: torch.add(x, m.p, alpha=2), (T, H)),
    "difference": (lambda m, x: m.p - x, (1, T, H)),
    "quotient": (lambda m, x: x / m.p, (T, 1)),
    "scalar": (lambda m, x: x * m.p, ()),
    "one number": (lambda m, x: x * m.p.tanh(), (1,)),
    "flat column": (lambda m, x: x * m.p.flatten(), (H, 1)),
    "transposed": (lambda m, x: x * m.p.T, (H, 1)),
    "transposed matrix": (lambda m, x: x * m.p.T, (H, T)),
    "IA3": (lambda m, x: x * imul(m), (H, 1)),
    "DoRA": (
        lambda m, x: ((m.p / m.c).view(1, -1) - 1) * x + (m.p / m.c).view(1, -1) * x.exp() * 2,
        (H,),
    ),
    "one value, two uses": (lambda m, x: (lambda s: (s - 1) * x + s * x.exp())(m.p / m.c), (H,)),
    "two parameters": (lambda m, x: x * m.p + m.q, (H,)),
    "two parameters in one value": (lambda m, x: x * (m.p * m.q), (H,)),
    "read twice in one value": (lambda m, x: x * (m.p * m.p), (H,)),
    "negated, reshaped and shifted": (lambda m, x: x * (-m.p.double().reshape(-1) + 1), (H, 1)),
    "changed through its base": (lambda m, x: x * through_its_base(m), (H,)),
    "rounded and not": (
        lambda m, x: x * m.p + x.exp() * m.p.div(m.c, rounding_mode="floor"),
        (H,),
    ),
    "gate": (lambda m, x: x + m.p.tanh() * x.sin(), (1, 1, 1)),
    "softmax": (lambda m, x: x * m.p.softmax(0), (H,)),
    "rows": (lambda m, x: x + m.p[:, :T], (1, T + 3, H)),
    "a part of it": (lambda m, x: x * m.p.chunk(2)[1], (2 * H,)),
    "in place": (lambda m, x: changed(x, lambda x: x.mul_(m.p)), (H,)),
    "in place by an operator": (lambda m, x: changed(x, lambda x: x.__iadd__(m.p)), (T, 1)),
    "written over": (lambda m, x: x * torch.zeros_like(x).copy_(m.p), (H,)),
    "expanded and joined": (lambda m, x: torch.cat((m.p.expand(len(x), -1, -1), x), 1), (1, 2, H)),
    "repeated": (lambda m, x: m.p.unsqueeze(0).repeat(len(x), 1, 1).add_(x), (T, H)),
    "expanded as": (lambda m, x: torch.maximum(m.p.expand_as(x), x), (T, H)),
    "where": (lambda m, x: torch.where(x > 0, x, m.p), (H,)),
    "addcmul": (lambda m, x: torch.addcmul(x, m.p, x), (H,)),
    "lerp": (lambda m, x: torch.lerp(x, x.cos(), m.p), (H,)),
    "power": (lambda m, x: (x.abs() + 1) ** m.p, (H,)),
    "reciprocal": (lambda m, x: x * (2 / m.p) + (1 - m.p), (1, 1, H)),
    "by name": (lambda m, x: torch.mul(input=x, other=m.p), (H,)),
    "read without gradient": (lambda m, x: x * m.p * m.p.detach() * m.p.data.sum(), (H,)),
    "read in inference mode": (lambda m, x: x * m.p * inferred(m), (H,)),
    "asked of its kind": (lambda m, x: x * m.p if isinstance(m.p, nn.Parameter) else x, (H,)),
    "asked of its shape": (lambda m, x: x * m.p.view(m.p.size(0)) * len(m.p) * m.p.dim(), (H,)),
}


@pytest.mark.parametrize("grad", [True, False], ids=["gradient of x", "x frozen"])
@pytest.mark.parametrize("case", FOLLOWED)
def test_sample_gradients_equal_one_sample_autograd(case, grad):
    function, shape = FOLLOWED[case]
    module = Module(function, *shape).double()
    x, plain = batch(grad).double().detach().requires_grad_(grad), batch().double()
    y, collector = run(module, x)
    assert not collector.strays
    assert_matches(y.detach(), module(plain).detach(), torch.float64)
    expected = truth(module, plain)
    assert collector.grads.keys() == expected.keys()
    for name, grads in expected.items():
        assert grads.count_nonzero()
        assert_matches(collector.grads[name], grads, torch.float64, terms=T)
    assert module.p.grad is None
    if grad:
        plain.requires_grad_()
        module(plain).sin().sum().backward()
        assert_matches(x.grad, plain.grad, torch.float64, terms=H)


@pytest.mark.parametrize("case", ["product", "IA3, one of them", "DoRA", "one value, two uses"])
def test_what_is_linear_in_a_parameter_is_pulled_back_by_its_slope(case, monkeypatch):
    """It costs one product; a backward pass within the backward pass costs more than the use."""
    function, shape = FOLLOWED.get(case, (lambda m, x: x * (1 * m.p.flatten()), (H, 1)))
    monkeypatch.setattr(torch.autograd, "grad", None)
    _, collector = run(Module(function, *shape), batch())
    assert set(collector.grads) == {"p"}


class Double(torch.autograd.Function):
    """A function of somebody's own, which no tensor's kind is asked for."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Reversed(torch.autograd.Function):
    """Another, that returns its input."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return -grad


ESCAPED = {
    "matrix product": (lambda m, x: x @ m.p, (H, H)),
    "also a matrix product": (lambda m, x: (x * m.p[0]) @ m.p, (H, H)),
    "a matrix product, and what it was made of": (lambda m, x: (x @ m.p) * m.p.sum(), (H, H)),
    "layer norm": (lambda m, x: nn.functional.layer_norm(x, (H,), m.p, m.q), (H,)),
    "joined as it is": (lambda m, x: torch.cat((x, m.p), 1), (N, T, H)),
    "assigned": (lambda m, x: changed(x, lambda x: x.__setitem__(0, m.p)), (H,)),
    "an own function": (lambda m, x: x * Double.apply(m.p), (H,)),
    "one that returns its input": (lambda m, x: x * Reversed.apply(m.p), (H,)),
    "not through the module": (lambda m, x: x * m._parameters["p"], (H,)),
    "its entries differ along the samples": (lambda m, x: x * m.p, (N, 1, H)),
    "changed by an activation": (lambda m, x: m.p.mul(1).mul_(x.mean((0, 1))) * x, (H,)),
}


@pytest.mark.parametrize("case", ESCAPED)
def test_any_other_use_is_seen(case):
    function, shape = ESCAPED[case]
    module, x = Module(function, *shape), batch(True)
    y, collector = run(module, x)
    assert "p" in collector.strays
    expected = module(batch())
    torch.testing.assert_close(y, expected)
    own, given = batch(True), x.grad
    module(own).sin().sum().backward()
    torch.testing.assert_close(given, own.grad)


def test_one_sample_makes_the_same_calls():
    """Also where a sample's activations have the parameter's own shape."""

    def forward(m, x):
        h = x + m.p
        h = h * 2
        h = h + nn.functional.layer_norm(h, (H,))
        return torch.cat((m.q.expand(len(x), -1, -1), h), 1).relu()

    module = Module(forward, 1, T, H)
    collector = Collector(module)
    with tracked(collector.sites, collector.consume), torch.no_grad():
        settled(module(batch()))
        many = list(collector.shapes)
        collector.shapes.clear()
        settled(module(batch()[:1]))
    assert many == [(N, T, H), (N, T, H)]
    assert collector.shapes == [(1, T, H), (1, T, H)]


def test_all_of_one_sample():
    """Whatever was taken for a constant."""
    module = Module(FOLLOWED["DoRA"][0], H).double()
    x = batch().double()[:1]
    taken = {}

    def consume(use, grad_out):
        for site, grad in zip(use.sites, use.sample_grads(grad_out[None]), strict=True):
            (name,) = site.names
            taken[name] = taken.get(name, 0) + grad

    sites = [Site(module, RULE, {"p": "p"}, None)]
    with tracked(sites, consume):
        settled(module(x)).sin().sum().backward()
    assert_matches(taken["p"], truth(module, x)["p"], torch.float64, terms=T)


def test_the_gradient_of_others_stays_as_it_is():
    """A sum gives the same tensor to both of its terms."""
    module = Module(lambda m, x: x + m.p.exp(), 1, T, H).double()
    x, own = batch(True).double()[:1], batch(True).double()[:1]
    x.retain_grad()
    own.retain_grad()
    with tracked(
        [Site(module, RULE, {"p": "p"}, None)],
        lambda use, grad: use.sample_grads(grad[None]),
    ):
        module(x).sin().sum().backward()
    module(own).sin().sum().backward()
    torch.testing.assert_close(x.grad, own.grad)


def test_tokens_and_samples_on_one_axis():
    module = Module(lambda m, x: x * m.p, H).double()
    x = batch().double()
    taken = []
    with tracked(
        [Site(module, RULE, {"p": "p"}, None)],
        lambda use, grad: taken.extend(use.sample_grads(grad.unflatten(0, (N, -1)))),
    ):
        module(x.flatten(0, 1)).sin().sum().backward()
    assert_matches(taken[0], truth(module, x)["p"], torch.float64, terms=T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_tokens_in_float32(dtype):
    module = Module(lambda m, x: x + m.p, H).to(dtype)
    x = torch.zeros(1, 5000, H, dtype=dtype)
    taken = []
    with tracked(
        [Site(module, RULE, {"p": "p"}, None)],
        lambda use, grad: taken.extend(use.sample_grads(grad[None])),
    ):
        module(x).sum().backward()
    assert taken[0].dtype == torch.float32
    assert torch.equal(taken[0], torch.full((1, H), 5000.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    def inner(m, x):
        s = m.p / m.c
        return (s - 1) * x + s * x.exp()

    module = Module(
        lambda m, x: torch.utils.checkpoint.checkpoint(inner, m, x, use_reentrant=reentrant), H
    ).double()
    x = batch().double().requires_grad_()
    _, collector = run(module, x)
    assert not collector.strays
    expected = truth(Module(inner, H).double(), x.detach())["p"]
    assert_matches(collector.grads["p"], expected, torch.float64, terms=T)


def test_new_data_is_the_parameters():
    def forward(m, x):
        m.p.data = m.p.data * 2
        return x * m.p

    module = Module(forward, H).double()
    before, x = module.p.detach().clone(), batch().double()
    y, collector = run(module, x)
    assert torch.equal(module.p, 2 * before)
    assert torch.equal(y, x * 2 * before)
    assert not collector.strays


def test_the_module_is_as_before():
    module = nn.ParameterDict({"a": torch.ones(H), "b": torch.ones(H)})
    cls, attributes = type(module), sorted(vars(module))
    site = Site(module, RULE, {"a": "a"}, None)

    def interrupted():
        with tracked([site], None):
            assert isinstance(module["a"], Tracked)
            assert type(module).__name__ == "ParameterDict"
            assert not isinstance(module["b"], Tracked)
            assert dict(module.named_parameters())["a"] is module._parameters["a"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(module) is cls
    assert sorted(vars(module)) == attributes
    assert module["a"] is module._parameters["a"]


def test_what_was_put_in_without_gradient_is_not_what_is_put_in_with_it():
    def forward(m, x):
        s = m.p.exp()
        with torch.no_grad():
            scale = nn.functional.layer_norm(x, (H,), s)
        return x * scale + nn.functional.layer_norm(x, (H,), s)

    _, collector = run(Module(forward, H), batch())
    assert "p" in collector.strays
