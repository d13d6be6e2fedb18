"""Run a module through its rule and hand (x, grad_out) to a consumer in the backward pass.

The module's class is exchanged for a subclass whose ``forward`` goes through one autograd
function. Its backward returns the input gradient, calls the consumer, and returns no gradient
for the module's own parameters, whatever their flags say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.interception.rules import Rule, rule_for

#: Called in the backward pass with (site, x, grad_out); its return value is the gradients of
#: the anchors that ``run_intercepted`` was given, in order.
Consumer = Callable[["Site", Tensor, Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Site:
    """A module under interception: its name, its rule, and what consumes its tensors."""

    name: str
    rule: Rule
    names: Mapping[str, str]  # local name -> name in the model, of the parameters concerned
    consume: Consumer
    called: Callable[[Site, Tensor], None] | None = None  # at each call, with the input


class _Intercepted(torch.autograd.Function):
    """``y = rule.forward(params, x)``; inputs: x, the module's tensors, the anchors."""

    @staticmethod
    def forward(
        ctx: Any, site: Site, local: tuple[str, ...], x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.site, ctx.local, ctx.x_dtype = site, local, x.dtype
        ctx.num_anchors = len(tensors) - len(local)
        ctx.set_materialize_grads(False)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point():
            # The layer would cast its input: keep the cast, as the ordinary graph does.
            x = x.to(torch.get_autocast_dtype(device))
        params = dict(zip(local, tensors, strict=False))
        ctx.save_for_backward(x, *params.values())
        y = site.rule.forward(params, x)
        # Autograd forbids changing a view in place where a custom function made it. The base of
        # this one is a temporary that nobody else sees (F.linear flattens [N, T] for its product).
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * len(ctx.local)
        if grad_out is None:
            return (None, None, None, *nothing, *(None,) * ctx.num_anchors)
        x, *tensors = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grad_x = None
            if ctx.needs_input_grad[2]:
                params = dict(zip(ctx.local, tensors, strict=True))
                grad_x = ctx.site.rule.input_grad(params, x, grad_out).to(ctx.x_dtype)
            return (None, None, grad_x, *nothing, *ctx.site.consume(ctx.site, x, grad_out))


def run_intercepted(
    site: Site, params: Mapping[str, Tensor], x: Tensor, anchors: Sequence[Tensor] = ()
) -> Tensor:
    """The module's output, with its backward replaced.

    Args:
        site: Names the rule and the consumer.
        params: The module's own tensors by local name. They get no gradient; the tensor hooks of
            those that require one fire with None once their last use is done.
        x: The module's input.
        anchors: Tensors whose gradients the consumer returns.
    """
    y: Tensor = _Intercepted.apply(site, tuple(params), x, *params.values(), *anchors)  # type: ignore[no-untyped-call]
    return y


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before fishkern exchanged it."""
    cls: type[nn.Module] = getattr(type(module), "_fishkern_original", type(module))
    return cls


Members = Callable[[type[nn.Module]], dict[str, Any]]


def exchange_class(module: nn.Module, members: Members) -> None:
    """Give the module a subclass of its class with the members that ``members(cls)`` returns."""
    cls: Any = original_class(module)
    module.__class__ = subclass(cls, members)


@functools.cache
def subclass(cls: type, members: Members) -> type[nn.Module]:
    """A subclass that passes for the class itself; the same one for the same members."""
    same = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**same, "_fishkern_original": cls, **members(cls)})


def _forward_members(cls: type[nn.Module]) -> dict[str, Any]:
    """The members of a class whose modules carry their site in ``_fishkern_site``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.__dict__["_fishkern_site"]
        if len(args) != 1 or kwargs:  # not the call that the rule describes: an ordinary use
            return cls.forward(self, *args, **kwargs)
        if site.called is not None:
            site.called(site, args[0])
        if not torch.is_grad_enabled():
            return cls.forward(self, *args)
        params = {n: p for n in site.rule.params if (p := self._parameters.get(n)) is not None}
        return run_intercepted(site, params, args[0])

    return {"forward": forward}


@contextmanager
def intercepted(sites: Mapping[nn.Module, Site]) -> Iterator[None]:
    """Run the given modules through their sites; afterwards their classes are as before."""
    before = {module: type(module) for module in sites}
    try:
        for module, site in sites.items():
            module.__dict__["_fishkern_site"] = site
            exchange_class(module, _forward_members)
        yield
    finally:
        for module, cls in before.items():
            module.__class__ = cls
            module.__dict__.pop("_fishkern_site", None)


def can_intercept(module: nn.Module) -> Rule | None:
    """The module's rule, if its forward is the one that the rule describes."""
    if "forward" in module.__dict__:  # somebody replaced this one module's forward
        return None
    rule = rule_for(original_class(module))
    if rule is not None and not module._parameters.keys() >= set(rule.params):
        return None  # made anew for each call, from others (weight_norm and pruning by hooks)
    return rule


@contextmanager
def original_parameters(model: nn.Module) -> Iterator[None]:
    """The model as it was before anything was attached to it; attached again afterwards.

    What is attached says how it is put aside: a context manager ``suspended`` on the class that
    its modules were given.
    """
    suspend = {
        id(attachment): attachment
        for module in model.modules()
        if (attachment := module.__dict__.get("_fishkern_attachment")) is not None
    }
    with ExitStack() as stack:
        for attachment in suspend.values():
            stack.enter_context(attachment.suspended())
        yield
