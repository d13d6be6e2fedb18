"""Run a module through its rule and hand (x, grad_out) to a consumer in the backward pass.

The module's class is exchanged for a subclass whose ``forward`` goes through one autograd
function. Its backward returns the input gradient, calls the consumer, and returns no gradient
for the module's own parameters, whatever their flags say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fishkern.interception.rules import Rule, original_class

R = TypeVar("R")

#: Called in the backward pass with (site, x, grad_out) - in x's place what the site's ``keep``
#: returned, if it has one; its return value is the gradients of the anchors that
#: ``run_intercepted`` was given, in order.
Consumer = Callable[["Site", Any, Tensor], Sequence[Tensor | None]]

#: Where the modules of a model hold what is attached to them: see ``original_parameters``.
ATTACHMENT = "_fishkern_attachment"


@dataclass(frozen=True, eq=False)
class Site:
    """A module under interception, its rule, and what consumes its tensors."""

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]  # local name -> name in the model, of the parameters concerned
    consume: Consumer
    called: Callable[[Site, Tensor], Tensor] | None = None  # at each call; returns the input
    # What the consumer needs for the input in the dtype that the layer computes in; None: that.
    keep: Callable[[Tensor, torch.dtype], Sequence[Tensor]] | None = None


def differentiable_once(backward: Callable[..., R]) -> Callable[..., R]:
    """``once_differentiable``, at no cost where no second derivative is asked for."""
    once: Callable[..., R] = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(*args: Any) -> R:
        return (once if torch.is_grad_enabled() else backward)(*args)

    return run


class _Intercepted(torch.autograd.Function):
    """``y = module(x)``; inputs: x, the module's own parameters, the anchors."""

    @staticmethod
    def forward(ctx: Any, site: Site, num_params: int, x: Tensor, *tensors: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # none of this is the model's
            device, dtype, given = x.device.type, x.dtype, x
            autocast = torch.is_autocast_enabled(device)
            ctx.site, ctx.x_dtype, ctx.num_params = site, dtype, num_params
            ctx.num_anchors = len(tensors) - num_params
            ctx.autocast = (device, torch.get_autocast_dtype(device), autocast)
            ctx.set_materialize_grads(False)
            if autocast and site.rule.autocasts and dtype != torch.float64:
                # The layer would cast its input: keep the cast, as the ordinary graph does.
                dtype = torch.get_autocast_dtype(device)
                x = x.to(dtype)
            kept: Sequence[Tensor] = [x]
            if site.keep is not None:
                kept = site.keep(given, dtype)
            elif site.names and not site.rule.reads_input(site.names):
                kept = [x.new_zeros(()).expand(x.shape)]  # the shape: x may be changed in place
        ctx.num_kept = len(kept)
        # The parameters are kept so that autograd notices if somebody writes to them.
        ctx.save_for_backward(*kept, *tensors[:num_params])
        y: Tensor = original_class(site.module).forward(site.module, x)
        # Autograd forbids changing a view in place where a custom function made it. The base of
        # this one is a temporary that nobody else sees (F.linear flattens [N, T] for its product).
        return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
        if ctx.site.keep is not None and torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph=True: what a {original_class(ctx.site.module).__name__} with "
                f"selected entries keeps of its input is too little for second derivatives; take "
                f"the first ones by torch.func.grad or torch.func.vjp, where they can be taken"
            )
        return _Intercepted._grads(ctx, grad_out)

    @staticmethod
    @differentiable_once
    def _grads(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * ctx.num_params
        if grad_out is None:
            return (None, None, None, *nothing, *(None,) * ctx.num_anchors)
        site, kept, grad_x = ctx.site, ctx.saved_tensors[: ctx.num_kept], None
        device, dtype, enabled = ctx.autocast
        if ctx.needs_input_grad[2]:
            with autocast(device, dtype, enabled):  # as in the forward pass
                # What was kept in its place is not read.
                grad_x = site.rule.input_grad(site.module, kept[0], grad_out).to(ctx.x_dtype)
        with autocast(device, dtype, enabled=False):
            given = kept[0] if site.keep is None else kept
            return (None, None, grad_x, *nothing, *site.consume(site, given, grad_out))


def autocast(device: str, dtype: torch.dtype | None, enabled: bool) -> AbstractContextManager[Any]:
    """``torch.autocast``; nothing at all where it is off and stays off."""
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=enabled)


def run_intercepted(site: Site, x: Tensor, anchors: Sequence[Tensor] = ()) -> Tensor:
    """The module's output, with its backward replaced.

    The parameters that the rule covers get no gradient; the tensor hooks of those that require one
    fire with None once their last use is done.

    Args:
        site: The module, its rule and its consumer.
        x: The module's input.
        anchors: Tensors whose gradients the consumer returns.
    """
    own = site.module._parameters
    params = [p for name in site.rule.params if (p := own.get(name)) is not None]
    y: Tensor = _Intercepted.apply(site, len(params), x, *params, *anchors)  # type: ignore[no-untyped-call]
    return y


Members = Callable[[type[nn.Module]], dict[str, Any]]


def exchange_class(module: nn.Module, members: Members) -> None:
    """Give the module a subclass of its class with the members that ``members(cls)`` returns."""
    cls: Any = original_class(module)
    module.__class__ = subclass(cls, members)


@functools.cache
def subclass(cls: type, members: Members) -> type[nn.Module]:
    """A subclass that passes for the class itself; the same one for the same members."""
    same = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    original = getattr(cls, "_fishkern_original", cls)
    return type(cls.__name__, (cls,), {**same, "_fishkern_original": original, **members(cls)})


def _forward_members(cls: type[nn.Module]) -> dict[str, Any]:
    """The members of a class whose modules carry their site in ``_fishkern_site``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: Site
        site, own = self.__dict__["_fishkern_site"]
        # functional_call puts other tensors in the place of the parameters.
        others = any(self._parameters.get(name) is not param for name, param in own.items())
        # Not the call that the rule describes: an ordinary use.
        if is_paused() or others or len(args) != 1 or kwargs or not site.rule.covers(self):
            return cls.forward(self, *args, **kwargs)
        x = args[0] if site.called is None else site.called(site, args[0])
        return run_intercepted(site, x) if torch.is_grad_enabled() else cls.forward(self, x)

    return {"forward": forward}


_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)


def is_paused() -> bool:
    """Whether modules run as if nobody listened: also inside ``torch.func``'s transforms.

    There a tensor stands for others of another shape, and gradients are not the loss's.
    """
    return _PAUSED.get() or is_transformed()


def is_transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func`` (vmap, grad, jvp, ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def paused() -> Iterator[None]:
    """Modules run as if nobody listened, in this thread: one is run again for its gradients."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


@contextmanager
def intercepted(sites: Mapping[nn.Module, Site]) -> Iterator[None]:
    """Run the given modules through their sites; afterwards their classes are as before."""
    before = {module: type(module) for module in sites}
    try:
        for module, site in sites.items():
            own = {name: module._parameters[name] for name in site.names}
            module.__dict__["_fishkern_site"] = site, own
            exchange_class(module, _forward_members)
        yield
    finally:
        for module, cls in before.items():
            module.__class__ = cls
            module.__dict__.pop("_fishkern_site", None)


@contextmanager
def original_parameters(model: nn.Module) -> Iterator[None]:
    """The model as it was before anything was attached to it; attached again afterwards.

    What is attached says how it is put aside, by its context manager ``suspended``.
    """
    suspend = {
        id(attachment): attachment
        for module in model.modules()
        if (attachment := module.__dict__.get(ATTACHMENT)) is not None
    }
    with ExitStack() as stack:
        for attachment in suspend.values():
            stack.enter_context(attachment.suspended())
        yield
