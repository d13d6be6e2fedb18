"""A module run again, sample by sample, against plain autograd of each sample alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fishkern.interception.rerun import Place, Rerun, RerunError, rerunning
from tests.support.tolerances import assert_matches

N, T, H = 4, 3, 5


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Product(nn.Module):
    """A weight made of two factors, which it alone knows."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterDict({"a": torch.randn(H, 2), "b": torch.randn(2, H)})

    def forward(self, x, scale=1.0):
        return F.linear(x, self.factors["a"] @ self.factors["b"]) * scale


class Legacy(torch.autograd.Function):
    """In the old style, which functorch refuses."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.T, a.T @ grad


class Stubborn(Product):
    def forward(self, x):
        return F.linear(x, Legacy.apply(self.factors["a"], self.factors["b"]))


class Branching(Product):
    """Goes by what it is given."""

    def forward(self, x):
        if x.abs().amax() > 1e6:
            raise OverflowError
        return super().forward(x)


class Remembering(Product):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Collected:
    """A consumer that keeps all samples' gradients, summed over the calls."""

    def __init__(self, module, own=None):
        places = {n: [Place(module.factors, n)] for n in module.factors}
        self.rerun = Rerun(module, places, self.consume, self.called)
        self.grads, self.shapes, self.troubles, self.own = {}, [], [], own

    def called(self, site, x):
        self.shapes.append((site is self.rerun.output, tuple(x.shape)))
        return x

    def consume(self, call, grad_out):
        self.troubles.append(call.trouble)
        if call.trouble:
            return
        own = self.own or [True] * len(call.tensors)
        tensors = [t[:, None] if o else t for t, o in zip(call.tensors, own, strict=True)]
        output = None if call.output is None else call.output[:, None]
        for start, grads in call.sample_grads(tensors, own, grad_out[:, None], output):
            for name, grad in grads.items():
                total = self.grads.setdefault(name, torch.zeros(N, *grad.shape[1:]))
                total[start : start + len(grad)] += grad


def reference(module, x, loss):
    """Each sample's gradients by plain autograd."""
    params = dict(module.factors.items())
    each = [torch.autograd.grad(loss(module(x[n : n + 1])), params.values()) for n in range(N)]
    return {
        name: torch.stack(parts)
        for name, parts in zip(params, zip(*each, strict=True), strict=True)
    }


def squares(y):
    return y.pow(3).sum()


@pytest.fixture(params=[Product, Stubborn, Branching, Remembering], ids=lambda cls: cls.__name__)
def module(request):
    return request.param()


def test_sample_gradients(module):
    x = torch.randn(N, T, H)
    truth = reference(module, x, squares)
    collected = Collected(module)
    hooked = []
    for param in module.factors.values():
        param.register_hook(hooked.append)
    module.__dict__.pop("last", None)
    x.requires_grad_()
    with rerunning([collected.rerun]):
        squares(module(x)).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)
    assert hooked == [None, None]  # complete, and no gradient took the ordinary way
    assert collected.shapes == [(False, (N, T, H)), (True, (N, T, H))]
    stubborn = isinstance(module, Stubborn | Branching)
    assert (collected.rerun.reason is not None) == stubborn
    plain = x.detach().requires_grad_()
    squares(module(plain)).backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_all_is_as_before(module):
    x = torch.randn(N, T, H)
    module(x)
    before, params = dict(vars(module)), dict(module.factors.items())
    with rerunning([Collected(module).rerun]):
        y = module(x)
        last = vars(module).get("last")
        squares(y).backward()
        assert vars(module).get("last") is last
    assert type(module) in (Product, Stubborn, Branching, Remembering)
    assert vars(module).keys() == before.keys()
    assert all(module.factors[name] is param for name, param in params.items())
    assert all(param.requires_grad and param.grad is None for param in params.values())


def test_exception_in_the_forward():
    module = Product()
    params = dict(module.factors.items())
    with pytest.raises(RuntimeError, match="shape"), rerunning([Collected(module).rerun]):
        module(torch.randn(N, H + 1))
    assert type(module) is Product
    assert all(module.factors[name] is param for name, param in params.items())


def test_many_samples_in_chunks(monkeypatch):
    module, x = Product(), torch.randn(N, T, H)
    truth = reference(module, x, squares)
    monkeypatch.setattr("fishkern.interception.rerun.CHUNK_BYTES", 0)
    collected = Collected(module)
    monkeypatch.setattr(collected.rerun, "samples_at_once", lambda: 3)
    with rerunning([collected.rerun]):
        squares(module(x)).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)


def test_called_twice():
    module, x = Product(), torch.randn(N, T, H)
    truth = reference(lambda_of(module, lambda m, x: m(m(x))), x, squares)
    collected = Collected(module)
    with rerunning([collected.rerun]):
        squares(module(module(x))).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)


def lambda_of(module, function):
    """A callable with the module's factors."""

    class Called:
        factors = module.factors

        def __call__(self, x):
            return function(module, x)

    return Called()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls(reentrant):
    """The second segment is computed again after the first has been compared."""
    module, x = Product(), torch.randn(N, T, H)
    truth = reference(lambda_of(module, lambda m, x: m(m(x))), x, squares)
    collected = Collected(module)
    with rerunning([collected.rerun]):
        y = checkpoint(module, x.requires_grad_(), use_reentrant=reentrant)
        squares(checkpoint(module, y, use_reentrant=reentrant)).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)


def test_arguments():
    """Keywords are followed; what all samples share is shared."""

    class Mixed(Product):
        def forward(self, x, *, shift, scale):
            return super().forward(x, scale) + shift

    module, x, shift = Mixed(), torch.randn(N, T, H), torch.randn(T, 1)
    truth = reference(lambda_of(module, lambda m, x: m(x, shift=shift, scale=2.0)), x, squares)
    collected = Collected(module, own=[True, False])
    with rerunning([collected.rerun]):
        squares(module(x, scale=2.0, shift=shift)).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)


def test_another_output_alone():
    """What depends on the samples beside it is not passed for a sample's own."""

    class Centred(Product):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    module = Centred()
    with (
        rerunning([Collected(module).rerun]),
        pytest.raises(RerunError, match="for a sample alone"),
    ):
        squares(module(torch.randn(N, T, H))).backward()


def test_arguments_of_unknown_types():
    """They may hold anything of any sample."""

    class Held:
        def __init__(self, x):
            self.x = x

    class Holding(Product):
        def forward(self, x, held):
            return super().forward(x) + held.x

    module, x = Holding(), torch.randn(N, T, H)
    collected = Collected(module)
    with rerunning([collected.rerun]):
        squares(module(x, Held(x))).backward()
    assert collected.troubles == ["it is given a Held"]


@pytest.mark.parametrize("inside", [True, False])
def test_inputs_changed_in_place(inside):
    class Overwriting(Product):
        def forward(self, x):
            y = super().forward(x.clone())
            if inside:
                x.zero_()
            return y

    module, x = Overwriting(), torch.randn(N, T, H)
    collected = Collected(module)
    with rerunning([collected.rerun]):
        y = module(x)
        if not inside:
            x.zero_()
        squares(y).backward()
    (trouble,) = collected.troubles
    assert "in place" in trouble


def test_in_place_on_the_output():
    module, x = Product(), torch.randn(N, T, H)
    truth = reference(lambda_of(module, lambda m, x: m(x).relu()), x, squares)
    collected = Collected(module)
    with rerunning([collected.rerun]):
        squares(module(x).relu_()).backward()
    for name, grads in truth.items():
        torch.testing.assert_close(collected.grads[name], grads)


def test_autocast_is_the_same_again():
    torch.set_default_dtype(torch.float32)
    module, x = Product(), torch.randn(N, T, H)
    collected = Collected(module)
    with rerunning([collected.rerun]), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
    with rerunning([collected.rerun]):
        y.float().sum().backward()  # outside of autocast
    assert all(grads.dtype == torch.float32 for grads in collected.grads.values())
    truth = reference(module, x, torch.sum)
    for name, grads in truth.items():
        assert_matches(collected.grads[name], grads, torch.bfloat16, terms=T)
