"""Parameters of which only their module's own forward knows what is done with them.

Products and transforms of a weight (LoHa, LoKr, OFT, FourierFT, ...) have no rule, and their
parameters never meet the activations themselves. But a whole module is a function of its inputs
and parameters, whatever it does: run again on one sample's inputs, with that sample's gradient at
its output, it gives the sample's gradient of the parameters. ``torch.func.vmap`` does so for many
samples at once; where it cannot, the one module is run sample by sample.

In the pass itself the module sees these parameters detached, so that they get no gradient but the
one made here; their tensor hooks fire with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fishkern.interception.capture import (
    Site,
    autocast,
    differentiable_once,
    is_paused,
    paused,
    subclass,
)
from fishkern.interception.elementwise import RULE
from fishkern.interception.rules import original_class
from fishkern.tensors import wide_dtype

#: Called in the backward pass with (call, grad_out).
CallConsumer = Callable[["Call", Tensor], None]

#: At least so many bytes of per-sample gradients are made at once, if there are as many.
CHUNK_BYTES = 64 << 20

#: What an argument may be besides a tensor: values that cannot hold a sample's part.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class RerunError(RuntimeError):
    """The module cannot be run again for single samples; says why."""


class Place(NamedTuple):
    """Where a module finds a parameter."""

    owner: nn.Module
    local: str


class Rerun:
    """A module to be run again, and the parameters for whose sake.

    Args:
        module: Its ``forward`` takes and returns tensors.
        places: Where it finds each of the parameters, by their names in the model.
        consume: Gets each call and the gradient at its output.
        called: As of ``Site``; given the shapes of the inputs and of the output, each of a site of
            its own (``inputs``, ``output``).
    """

    def __init__(
        self,
        module: nn.Module,
        places: Mapping[str, list[Place]],
        consume: CallConsumer,
        called: Callable[[Site, Tensor], Tensor],
    ) -> None:
        self.module, self.places, self.consume, self.called = module, places, consume, called
        params = {name: owner._parameters[local] for name, ((owner, local), *_) in places.items()}
        self.params = {name: param for name, param in params.items() if param is not None}
        self.inputs: list[Site] = []
        self.output = self._site({name: name for name in self.params})
        #: Why vmap is not what runs it; None: it is.
        self.reason: str | None = None
        #: Kinds of calls whose outputs were seen to be the same; ``known``: before this pass, in
        #: which checkpointing wants the same to be saved twice.
        self.checked: set[Any] = set()
        self.known: frozenset[Any] = frozenset()

    def _site(self, names: Mapping[str, str]) -> Site:
        return Site(self.module, RULE, names, _nothing, self.called)

    def input(self, position: int) -> Site:
        """The site of the n-th tensor among the arguments."""
        while len(self.inputs) <= position:
            self.inputs.append(self._site({}))
        return self.inputs[position]

    @contextmanager
    def standing_in(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The module finds these values in the place of its parameters."""
        own = [(place, values[name]) for name in values for place in self.places[name]]
        before = [(place, place.owner._parameters[place.local]) for place, _ in own]
        try:
            for (owner, local), value in own:
                owner._parameters[local] = value  # type: ignore[assignment]
            yield
        finally:
            for (owner, local), param in before:
                owner._parameters[local] = param

    def detached(self) -> dict[str, Tensor]:
        """The parameters without a gradient; still parameters, should anybody ask."""
        return {n: nn.Parameter(p.detach(), requires_grad=False) for n, p in self.params.items()}

    def samples_at_once(self) -> int:
        """How many samples' gradients fit into the module's working set.

        Whatever is made of a parameter may be as large as any other in the module.
        """
        size = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return max(1, max(CHUNK_BYTES, 4 * size) // max(1, size))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the module notes on itself while it runs again is forgotten."""
        modules = list(self.module.modules())
        places = [d for m in modules for d in (m.__dict__, m._buffers)]
        before = [(place, dict(place)) for place in places]
        try:
            with paused():
                yield
        finally:
            for place, items in before:
                if place.keys() != items.keys() or any(place[k] is not items[k] for k in items):
                    place.clear()
                    place.update(items)


class Call:
    """One call of a module: its arguments, and all that its result depends on besides them."""

    def __init__(self, rerun: Rerun, args: Any, kwargs: Any) -> None:
        self.rerun = rerun
        leaves, self.spec = tree_flatten((args, kwargs))
        self.sites: list[Site] = []
        self.others: list[Any] = []
        tensors: list[Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                site = rerun.input(len(tensors))
                tensors.append(rerun.called(site, leaf))
                self.sites.append(site)
            self.others.append(None if isinstance(leaf, Tensor) else leaf)
        self.positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        self.output: Tensor | None = None  # kept for a comparison, where one is due
        self.shape = torch.Size()  # the output's
        self.trouble = self._foreign()
        self.versions = [tensor._version for tensor in tensors]
        self.autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    def _foreign(self) -> str | None:
        foreign = {type(o).__name__ for o in self.others if not isinstance(o, _PLAIN)}
        return f"it is given a {min(foreign)}" if foreign else None

    @property
    def names(self) -> list[str]:
        """Of the parameters concerned, in the model."""
        return list(self.rerun.params)

    @property
    def kind(self) -> tuple[TreeSpec, str]:
        """What all calls have in common that differ in their tensors only."""
        return self.spec, repr(self.others)

    def forward(self, cls: type[nn.Module], tensors: Iterable[Tensor]) -> Any:
        """The module's forward of this class, on the call's arguments or one sample's of them."""
        leaves = list(self.others)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return cls.forward(self.rerun.module, *args, **kwargs)

    def alone(self, tensors: Iterable[Tensor]) -> Tensor:
        """The module's own output for one sample."""
        y = self.forward(original_class(self.rerun.module), tensors)
        if not isinstance(y, Tensor):
            raise TypeError(f"it returns a {type(y).__name__}")
        return y

    def passed(self, y: Tensor) -> Tensor:
        """The output, whose gradient goes to the consumer as well."""
        if [tensor._version for tensor in self.tensors] != self.versions:
            self.trouble = "it changes its input in place"
        self.output = None if self.kind in self.rerun.known else y.detach()
        self.shape, device = y.shape, y.device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = (device, torch.get_autocast_dtype(device), enabled)
        result: Tensor = _Passed.apply(self, y, *self.rerun.params.values())  # type: ignore[no-untyped-call]
        return result

    def sample_grads(
        self,
        tensors: list[Tensor],
        own: list[bool],
        grad_out: Tensor,
        output: Tensor | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each sample's gradients, some samples at a time.

        Args:
            tensors: The tensors among the arguments: ``[N, *]`` where ``own`` says that each sample
                has its own part, as if it were alone; the others are all samples'.
            own: See ``tensors``.
            grad_out: ``[N, *]``, each sample's gradient at the output, as if it were alone.
            output: ``[N, *]``, what must come out again; None: this is known.

        Yields:
            The first sample's number, and by name ``[n, *param.shape]``, in float32 at least.

        Raises:
            RerunError: The module gives something else, or nothing, for a sample alone.
        """
        size, at_once = len(grad_out), self.rerun.samples_at_once()
        for start in range(0, size, at_once):
            part = slice(start, start + at_once)
            inputs = [t[part] if o else t for t, o in zip(tensors, own, strict=True)]
            grads, found = self._chunk(inputs, own, grad_out[part])
            if output is not None and not _close(found, output[part]):
                raise RerunError("its output for a sample alone is not the one in the batch")
            wide = wide_dtype(grad_out)
            yield start, {name: grad.to(wide) for name, grad in grads.items()}

    def _chunk(
        self, tensors: list[Tensor], own: list[bool], grad_out: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            if self.rerun.reason is None and len(grad_out) > 1:
                try:
                    with self.rerun.aside():
                        return self._together(tensors, own, grad_out)
                except Exception as error:  # whatever a module does that vmap cannot
                    self.rerun.reason = f"vmap: {_first_line(error)}"
            try:
                with self.rerun.aside():
                    return self._one_by_one(tensors, own, grad_out)
            except Exception as error:  # whatever keeps the module from running alone
                raise RerunError(_first_line(error)) from error

    def _together(
        self, tensors: list[Tensor], own: list[bool], grad_out: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        values = {name: param.detach() for name, param in self.rerun.params.items()}

        def one(tensors: list[Tensor], grad: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            def run(values: dict[str, Tensor]) -> Tensor:
                with self.rerun.standing_in(values):
                    return self.alone(tensors)

            y, pull, *_ = torch.func.vjp(run, values)
            return pull(grad)[0], y

        in_dims = ([0 if o else None for o in own], 0)
        result: tuple[dict[str, Tensor], Tensor] = torch.func.vmap(one, in_dims)(tensors, grad_out)
        return result

    def _one_by_one(
        self, tensors: list[Tensor], own: list[bool], grad_out: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        grads: list[tuple[Tensor, ...]] = []
        outputs = []
        for n, grad in enumerate(grad_out):
            values = {
                name: nn.Parameter(param.detach()) for name, param in self.rerun.params.items()
            }
            with torch.enable_grad(), self.rerun.standing_in(values):
                y = self.alone(t[n] if o else t for t, o in zip(tensors, own, strict=True))
            outputs.append(y.detach())
            chosen = list(values.values())
            grads.append(
                torch.autograd.grad(y, chosen, grad, materialize_grads=True)
                if y.requires_grad
                else tuple(torch.zeros_like(value) for value in chosen)
            )
        each = (torch.stack(list(part)) for part in zip(*grads, strict=True))
        return dict(zip(self.rerun.params, each, strict=True)), torch.stack(outputs)


def _close(found: Tensor, output: Tensor) -> bool:
    """Whether both are the same but for rounding."""
    if found.shape != output.shape:
        return False
    tolerance = 1e-2 if output.dtype in (torch.float32, torch.float64) else 1e-1
    error = torch.linalg.vector_norm((found - output).float())
    return bool(error <= tolerance * torch.linalg.vector_norm(output.float()))


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _nothing(*_: Any) -> tuple[()]:
    return ()


class _Passed(torch.autograd.Function):
    """A call's output; inputs: the call, the output, and the parameters, which get None."""

    @staticmethod
    def forward(ctx: Any, call: Call, y: Tensor, *params: Tensor) -> Tensor:
        ctx.call, ctx.num_params = call, len(params)
        ctx.set_materialize_grads(False)
        kept = () if call.output is None else (call.output,)
        ctx.save_for_backward(*call.tensors, *kept)
        call.tensors, call.output = (), None
        return y.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
        if grad_out is not None:
            call: Call = ctx.call
            try:
                saved = ctx.saved_tensors
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                saved, call.trouble = (), "its input is changed in place later on"
            num_tensors = len(call.sites)
            call.tensors = tuple(tensor.detach() for tensor in saved[:num_tensors])
            call.output = saved[num_tensors] if len(saved) > num_tensors else None
            try:
                with autocast(grad_out.device.type, None, enabled=False):
                    call.rerun.consume(call, grad_out)
            finally:
                call.tensors, call.output = (), None
        return (None, grad_out, *(None,) * ctx.num_params)


_RERUN = "_fishkern_rerun"


def _members(cls: type[nn.Module]) -> dict[str, Any]:
    """The members of a class whose modules carry their ``Rerun``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_paused():
            return cls.forward(self, *args, **kwargs)
        rerun: Rerun = self.__dict__[_RERUN]
        call = Call(rerun, args, kwargs)
        with rerun.standing_in(rerun.detached()):
            y = call.forward(cls, call.tensors)
        if not isinstance(y, Tensor):  # parameters that take the ordinary way are noticed
            return call.forward(cls, call.tensors)
        y = rerun.called(rerun.output, y)
        return call.passed(y) if torch.is_grad_enabled() else y

    return {"forward": forward}


@contextmanager
def rerunning(reruns: Iterable[Rerun]) -> Iterator[None]:
    """Hand each call of the modules to their consumers; afterwards their classes are as before."""
    before = {rerun: type(rerun.module) for rerun in reruns}
    try:
        for rerun, cls in before.items():
            rerun.known = frozenset(rerun.checked)
            rerun.module.__dict__[_RERUN] = rerun
            rerun.module.__class__ = subclass(cls, _members)  # type: ignore[arg-type]
        yield
    finally:
        for rerun, cls in before.items():
            rerun.module.__class__ = cls
            rerun.module.__dict__.pop(_RERUN, None)
