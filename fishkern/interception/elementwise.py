"""Parameters that a module multiplies, adds or concatenates with activations, in its own forward.

No rule can know such a module (IA3's and VeRA's vectors, DoRA's magnitude, layer scale, position
embeddings, class tokens). But whatever is done with the parameter, its gradient arrives where it
meets the activations, and there it still has their shape, samples and all. So whoever reads the
parameter gets a ``Tracked``: a tensor that notes what is made of the parameter alone (views, casts,
arithmetic with constants), ``value = f(p)``, and that, where it meets an activation, is put in
expanded to the activation's shape. The operation is the ordinary one, whichever it is; the gradient
at what was put in is summed over the tokens, sample by sample, pulled back through f, and handed to
a consumer. The parameter itself gets None, as it does from modules with a rule.

Where a tracked tensor goes into any other function (a matrix product, say), it is put in with its
own shape, in which no axis grows with the number of samples: the consumer sees that, and leaves the
parameter to another route. Where it goes unseen into foreign code, the gradient takes its ordinary
way to the parameter, whose tensor hook tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fishkern.interception.capture import Site, is_paused, subclass
from fishkern.interception.put_in import Use, UseConsumer, put_in
from fishkern.interception.rules import Rule

#: Functions that broadcast their tensors against each other, and in which no entry meets another.
POINTWISE = {
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "rdiv", "true_divide"),
    *("pow", "rpow", "float_power", "maximum", "minimum", "hypot", "atan2", "lerp"),
    *("addcmul", "addcdiv", "where", "masked_fill", "copy"),
}
#: Functions of a first tensor that keep its entries, up to what is added, and their order.
KEEPING = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"),
    *("add", "sub", "subtract"),
}
#: Functions that are linear in a first tensor, entry by entry.
SCALING = {"mul", "multiply", "div", "divide", "true_divide", "neg"}
#: Functions that repeat their tensor along axes of length 1.
EXPANDING = {"expand", "expand_as", "broadcast_to", "repeat"}
#: Attributes that a gradient leads through; all others are read off the tensor.
TRANSPOSED = {"T", "mT", "H", "mH"}
#: Functions of values alone.
DETACHING = {"detach", "detach_", "requires_grad_"}


class ElementwiseRule(Rule):
    """What the ``Site`` of such a parameter says of it: any axis may be the samples'."""

    params = ()

    def input_dims(self, module: nn.Module) -> int:
        """None is known to be a feature's."""
        return 0


RULE = ElementwiseRule()


class Tracked(Tensor):
    """A parameter, or what was made of parameters alone.

    To code that does not ask for its kind it is an ordinary part of the parameter's graph.
    """

    value: Tensor  # the plain tensor; its graph ends in the aliases
    sources: dict[Tensor, Site]  # the aliases in value's graph, and the parameters' sites
    consume: UseConsumer
    slope: Tensor | None  # see Use; only as long as value is not changed in place,
    version: int  # which this tells
    met: torch.Size | None  # the shape in which a constant first met it
    #: What was put in, once it met a function of another kind: with or without gradient.
    settled: dict[bool, Tensor]

    @staticmethod
    def make(value: Tensor, sources: dict[Tensor, Site], consume: UseConsumer) -> Tracked:
        """Track a plain tensor."""
        tracked = value.as_subclass(Tracked)
        tracked.value, tracked.sources, tracked.consume = value, sources, consume
        tracked.slope, tracked.version = None, value._version
        tracked.met, tracked.settled = None, {}
        return tracked

    def use(self, shape: torch.Size, met: torch.Size | None = None) -> Tensor:
        """What is put in among tensors that broadcast to ``shape``, having met the first before."""
        seen = self.value.new_empty(()).expand(shape if met is None else met)
        sites = dict.fromkeys(self.sources.values())
        for site in sites:
            if site.called is not None:
                site.called(site, seen)
        if not torch.is_grad_enabled():
            return self.value.expand(shape)
        own = [site.module._parameters[name] for site in sites for name in site.names]
        use = Use(self.value, self.sources, self.known_slope(), shape, seen.shape)
        return put_in(use, self.consume, [param for param in own if param is not None])

    def known_slope(self) -> Tensor | None:
        """None once the value was changed in place, perhaps through another view of it."""
        return self.slope if self.value._version == self.version else None

    def settle(self) -> Tensor:
        """What is put in in its own shape, once and for all.

        If what it met was no constant but a single sample's activation, then that was the place
        where, among several samples, it would have been put in.
        """
        mode = torch.is_grad_enabled()
        if mode not in self.settled:
            self.settled[mode] = self.use(self.value.shape, self.met)
        return self.settled[mode]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Follow what is made of parameters alone; put it in among all else."""
        with torch._C.DisableTorchFunctionSubclass():
            reads = getattr(func, "__name__", "") == "__get__"
            if reads and func.__self__.__name__ not in TRANSPOSED:
                return func(args[0].value)  # an attribute, such as the shape
            return _Call(func, args, kwargs or {}).result()


class _Call:
    """A call of a function with at least one tracked tensor."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, name = func, getattr(func, "__name__", "")
        self.sets = name == "__set__"  # an attribute
        if self.sets or name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        self.in_place = name == "__setitem__" or (name.endswith("_") and name[-2:] != "__")
        self.name = name.strip("_")
        self.tracked: list[Tracked] = []
        self.others: list[Tensor] = []
        self.args, self.kwargs = _mapped(self.sorted, args), _mapped(self.sorted, kwargs)

    def sorted(self, tensor: Tensor) -> Tensor:
        """What it is at present, noted among the tracked ones or the others."""
        tensor = _current(tensor)
        if isinstance(tensor, Tracked):
            self.tracked.append(tensor)
        else:
            self.others.append(tensor)
        return tensor

    def first(self) -> bool:
        """Whether the first argument is tracked."""
        return bool(self.args) and isinstance(self.args[0], Tracked)

    def result(self) -> Any:
        """What the function returns, with tracked tensors followed or put in."""
        if not self.tracked or self.name in DETACHING:
            return self.run(_value)
        if self.sets:
            return self.run(_own)
        if self.in_place and self.first():
            return self.changed()
        if self.name in EXPANDING and self.first():
            return self.expanded()
        pointwise = self.name in POINTWISE
        if not self.others and (pointwise or len(self.tracked) == 1):
            return self.followed()
        if pointwise and self.is_constant() and not self.in_place:
            return self.followed()
        if pointwise:
            shape = self.shape()
            return self.run(lambda tracked: tracked.use(shape))
        return self.run(Tracked.settle)

    def run(self, replace: Callable[[Tracked], Tensor]) -> Any:
        """Call the function with plain tensors."""

        def plain(tensor: Tensor) -> Tensor:
            return replace(tensor) if isinstance(tensor, Tracked) else tensor

        return self.func(*_mapped(plain, self.args), **_mapped(plain, self.kwargs))

    def shape(self) -> torch.Size:
        """That of the result of a pointwise function (torch.broadcast_shapes is slow)."""
        shapes = [tensor.shape[::-1] for tensor in (*self.tracked, *self.others)]
        axes = zip_longest(*shapes, fillvalue=1)
        return torch.Size([min(axis) if 0 in axis else max(axis) for axis in axes][::-1])

    def is_constant(self) -> bool:
        """Whether the other tensors are no activations: they add no axis and need no gradient.

        Activations of a single sample may pass for a constant, and are then a part of what is made
        of the parameter: of one sample any such part has the right gradient.
        """
        return (
            self.name in POINTWISE
            and not any(other.requires_grad for other in self.others)
            and self.shape().numel() == max(tracked.value.numel() for tracked in self.tracked)
        )

    def followed(self) -> Any:
        """The result, tracked where a gradient leads through it."""
        # Checkpointing lets nobody unpack twice what was saved, as two uses of the result would.
        with saved_tensors_hooks(_itself, _itself):
            result = self.run(_value)
        return _mapped(self.track, result)

    def track(self, result: Tensor) -> Tensor:
        """The result is made of all that the tracked tensors are made of."""
        if not result.is_floating_point() or result.is_inference():
            return result
        if torch.is_grad_enabled() and not result.requires_grad:
            return result
        tracked = Tracked.make(result, self.sources(), self.tracked[0].consume)
        tracked.slope = self.slope(result)
        tracked.met = next((t.met for t in self.tracked if t.met is not None), None)
        if tracked.met is None and self.others:
            tracked.met = result.shape
        return tracked

    def slope(self, result: Tensor) -> Tensor | None:
        """That of the result, if it is linear in the parameter, entry by entry."""
        slope = self.tracked[0].known_slope()
        if slope is None or len(self.tracked) > 1 or not self.first():
            return None
        if self.name in KEEPING and result.numel() == slope.numel():
            return slope.reshape(result.shape)
        if self.name in SCALING and not self.kwargs:  # div(rounding_mode=...)
            return self.run(lambda _: slope)  # type: ignore[no-any-return]
        return None

    def sources(self) -> dict[Tensor, Site]:
        """Of all tracked tensors."""
        return {alias: site for t in self.tracked for alias, site in t.sources.items()}

    def changed(self) -> Tensor:
        """A tracked tensor changed in place."""
        tracked: Tracked = self.args[0]
        follow = not self.others or self.is_constant()
        with saved_tensors_hooks(_itself, _itself):
            self.run(_value)
        if not follow:  # activations came in: from here on its gradient goes the ordinary way
            tracked.settled = {True: tracked.value, False: tracked.value}
            return tracked.value
        tracked.sources = self.sources()
        return tracked

    def expanded(self) -> Any:
        """Repetition along axes of length 1 is a use: they may become the samples'."""
        tracked: Tracked = self.args[0]
        result = self.run(_value)
        if result.numel() == tracked.value.numel() or not _broadcasts(tracked.value, result):
            return self.followed()
        expanded = tracked.use(result.shape)
        return expanded.clone() if self.name == "repeat" else expanded


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with the function applied to each tensor in it, in as many lists as there are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(function, part) for part in value])
    if type(value) is dict and value:
        return {key: _mapped(function, part) for key, part in value.items()}
    return value


def _current(tensor: Tensor) -> Tensor:
    """A tracked tensor only where it is still to be followed."""
    if not isinstance(tensor, Tracked):
        return tensor
    mode = torch.is_grad_enabled()
    if mode and tensor.value.grad_fn is None:
        # Made where no gradient is recorded: a constant, or what an autograd function returned,
        # whose gradient goes the ordinary way.
        return tensor.as_subclass(Tensor)
    return tensor.settled.get(mode, tensor)


def _value(tracked: Tracked) -> Tensor:
    return tracked.value


def _own(tracked: Tracked) -> Tensor:
    """What an attribute is set of: the parameter itself (``module.weight.data = ...``)."""
    param = tracked.value._base if getattr(tracked, "_is_param", False) else None
    return tracked.value if param is None else param


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _broadcasts(small: Tensor, large: Tensor) -> bool:
    own = large.shape[large.dim() - small.dim() :]
    return all(a in (1, b) for a, b in zip(small.shape, own, strict=True))


def settled(tensor: Any) -> Any:
    """For functions that take no notice of the kinds of their tensors: a plain one."""
    return tensor.settle() if isinstance(tensor, Tracked) else tensor


@contextmanager
def tracked(sites: Iterable[Site], consume: UseConsumer) -> Iterator[None]:
    """Whoever reads the sites' parameters gets tracked ones; afterwards all is as before.

    Args:
        sites: One for each parameter: its module, ``RULE`` and its name. ``called`` is given each
            use's shape.
        consume: Gets each use and the gradient there.
    """
    owners: dict[nn.Module, dict[str, Site]] = {}
    for site in sites:
        owners.setdefault(site.module, {}).update(dict.fromkeys(site.names, site))
    before = {module: type(module) for module in owners}
    try:
        for module, own in owners.items():
            params = {name: module._parameters[name] for name in own}
            module.__dict__[_SITES] = (own, params, consume)
            cls: Any = type(module)
            module.__class__ = subclass(cls, _reading(tuple(own)))
        yield
    finally:
        for module, cls in before.items():
            module.__class__ = cls
            module.__dict__.pop(_SITES, None)


_SITES = "_fishkern_elementwise"


@functools.cache
def _reading(names: tuple[str, ...]) -> Callable[[type[nn.Module]], dict[str, Any]]:
    """The members of a class whose parameters ``names`` are read as tracked ones."""

    def members(cls: type[nn.Module]) -> dict[str, Any]:
        return {name: property(functools.partial(_read, name)) for name in names}

    return members


def _read(name: str, owner: nn.Module) -> Tensor:
    sites, params, consume = owner.__dict__[_SITES]
    param = owner._parameters[name]
    assert param is not None
    if is_paused() or param is not params[name]:  # functional_call put another in its place
        return param
    with torch._C.DisableTorchFunction():
        alias = param.view_as(param)
        tracked = Tracked.make(alias, {alias: sites[name]}, consume)
        tracked.slope = param.new_ones(()).expand(param.shape)
    tracked._is_param = True  # isinstance(tracked, nn.Parameter) holds
    return tracked
