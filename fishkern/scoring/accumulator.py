"""The Fisher consumer of interception: hold, join, square - once a parameter is complete.

A parameter's per-sample gradient is a sum over all its uses, and it is squared after that sum.
So (x, grad_out) of each use is held until the tensor hook on the parameter fires: once per
graph, after its last use. With None, every use went through a rule: what is held is joined along
the token axis, squared and accumulated. With a gradient, some use went past the rules (a
functional use, say): what is held is dropped and the parameter is left to an exact, slower route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishkern.batches.packing import Packing
from fishkern.interception import Site, elementwise, original_class
from fishkern.interception.embedding import EmbeddingRule
from fishkern.interception.linear import LinearRule
from fishkern.interception.put_in import Use
from fishkern.interception.rerun import CHUNK_BYTES, Call, RerunError
from fishkern.scoring.choices import watching
from fishkern.scoring.layouts import Layouts, Noted
from fishkern.scoring.squares import Squares
from fishkern.scoring.tied import HeadRows, head_rows
from fishkern.scoring.torch_functions import unwatched


class _Use(NamedTuple):
    site: Site
    x: Tensor
    grad_out: Tensor


class FisherAccumulator:
    """Accumulates ``sum_n g_n^2`` for each parameter, batch by batch."""

    def __init__(self, params: Mapping[str, nn.Parameter], squares: Squares) -> None:
        self.params = params
        self.squares = squares
        self.tied: set[str] = set()  # scored by a formula that can round to less than zero
        #: Why parameters were last left to another route.
        self.reasons: dict[str, str] = {}
        self.layouts = Layouts()
        self._begin()

    def _begin(self, packing: Packing | None = None) -> None:
        self.layouts.begin(packing)
        self.broadcast: int | None = None
        self.expanded = False
        self.num_calls: Counter[str] = Counter()
        self.in_segments: set[str] = set()
        self.uses: dict[str, list[_Use]] = {}
        self.ready: dict[str, Tensor] = {}
        self.num_uses: Counter[str] = Counter()
        self.lookups: dict[str, list[_Use]] = {}
        self.head_rows: dict[str, HeadRows] = {}
        self.complete: set[str] = set()
        self.squares.done.clear()
        self.strays: set[str] = set()
        self.spoiled: set[str] = set()
        #: Whether loss_fn or the model took gradients within the forward pass.
        self.differentiated = False

    @contextmanager
    def batch(
        self, names: Sequence[str], broadcast: int | None = None, packing: Packing | None = None
    ) -> Iterator[None]:
        """One forward and its backwards; hooks on the parameters ``names`` report completion.

        ``broadcast``: the number of samples to which inputs that stand for all of them are
        expanded, so that the gradient at the output comes sample by sample. ``packing``: how the
        batch's samples are packed, if they are.
        """
        self._begin(packing)
        self.broadcast = broadcast
        self.strays = set(self.params).difference(names)  # scored elsewhere: nothing is held
        with ExitStack() as stack:
            for held in (self.uses, self.ready, self.head_rows):
                stack.callback(held.clear)
            with torch._C.DisableTorchFunction():
                for name in names:
                    hook = self.params[name].register_hook(partial(self._completed, name))
                    stack.enter_context(hook)
            stack.enter_context(watching(self.layouts.note_choice, self._differentiated))
            yield

    # In the forward pass

    @unwatched
    def called(self, site: Site, x: Tensor) -> Tensor:
        """Note the shape of each input (not of those that checkpointing computes again)."""
        x = elementwise.settled(x)
        if self.broadcast and site.rule.broadcasts and x.dim() > 1 and len(x) == 1:
            x = x.expand(self.broadcast, *x.shape[1:])
            self.expanded = True
        if self.layouts.note(site, tuple(x.shape)):
            self.num_calls.update(site.names.values())
            if not torch.is_grad_enabled():  # so runs the forward of reentrant checkpointing
                self.in_segments.update(site.names.values())
            if type(site.rule) is EmbeddingRule:
                for name in site.names.values():
                    self.lookups.setdefault(name, []).append(_Use(site, x, x))
        return x

    def _differentiated(self) -> None:
        self.differentiated = self.differentiated or self.layouts.in_forward

    def forget_calls(self) -> None:
        """The forward pass starts again."""
        self.layouts.forget_calls()
        self.num_calls.clear()
        self.in_segments.clear()
        self.lookups.clear()

    @contextmanager
    def aside(self) -> Iterator[Noted]:
        """What is noted of a pass in between, which does not count and is not expanded."""
        broadcast, self.broadcast = self.broadcast, None
        try:
            with self.layouts.aside() as noted:
                yield noted
        finally:
            self.broadcast = broadcast

    # In the backward pass

    @unwatched
    def consume(self, site: Site, x: Tensor, grad_out: Tensor) -> tuple[()]:
        """Hold a use until its parameters are complete."""
        if self.layouts.of(site, tuple(x.shape)) is None:
            for name in site.names.values():
                self._stray(name, _not_found(x.shape, site.module))
        for name in site.names.values():
            if name not in self.strays:
                self.uses.setdefault(name, []).append(_Use(site, x, grad_out))
                self.num_uses[name] += 1
                if name in self.lookups and type(site.rule) is LinearRule:  # as in tied.py
                    self._consume_head(name)
        return ()

    @torch.no_grad()
    def _consume_head(self, name: str) -> None:
        """Square a tied head at its turn, keeping only the rows that the embedding will need."""
        heads = [use for use in self.uses[name] if type(use.site.rule) is LinearRule]
        lookups = self.lookups[name]
        if len(heads) + len(lookups) < self.num_calls[name] or name in self.ready:
            return  # more to come, perhaps of another kind: hold
        layouts = [self.layouts.of(use.site, tuple(use.x.shape)) for use in lookups]
        if None in layouts or not _same_layer(lookups):
            return
        ids = _joined(tuple(self._samples_first(use, use.x, 0) for use in lookups))
        xs, grads = zip(*(self._tensors(use) for use in heads), strict=True)
        x, grad_out = _joined(xs), _joined(grads)
        self.head_rows[name] = head_rows(ids, x, grad_out)
        rule, module = heads[0].site.rule, heads[0].site.module
        self.squares.add_layer(rule, module, {_local_name(heads[0].site, name): name}, x, grad_out)
        self.uses[name] = [u for u in self.uses[name] if type(u.site.rule) is not LinearRule]

    def _accumulate_lookups(self, name: str) -> None:
        """``2 H E + E^2``, with H of a head that was squared before."""
        uses, rows = self.uses[name], self.head_rows[name]
        self._drop(name)
        if not uses:  # the embedding's output was detached
            return
        ids, grads = zip(*(self._tensors(use) for use in uses), strict=True)
        x, grad_out = _joined(ids), _joined(grads)
        module = uses[0].site.module
        cross = rows.cross(x, grad_out)
        padding_idx = getattr(module, "padding_idx", None)
        if padding_idx is not None:
            cross.masked_fill_((x == padding_idx).unsqueeze(-1), 0.0)
        self.squares.add_rows(name, x, cross)
        local = _local_name(uses[0].site, name)
        self.squares.add_layer(uses[0].site.rule, module, {local: name}, x, grad_out)
        self.tied.add(name)

    @unwatched
    def consume_elementwise(self, use: Use, grad_out: Tensor) -> None:
        """Hold each sample's gradients of what was put in among activations."""
        shape = tuple(use.seen)
        names = [name for site in use.sites for name in site.names.values()]
        layouts = {self.layouts.of(site, shape) for site in use.sites}
        layout = layouts.pop() if len(layouts) == 1 else None
        by_sample = None if layout is None else self.layouts.by_sample(layout, use, grad_out)
        if by_sample is None:
            for name in names:
                reason = f"it meets activations of shape {list(shape)} of no layout by samples"
                self._stray(name, reason)
        elif not self.strays.issuperset(names):
            for site, grads in zip(use.sites, use.sample_grads(by_sample), strict=True):
                for name in site.names.values():
                    self.add_sample_grads(name, grads)

    def consume_rerun(self, call: Call, grad_out: Tensor) -> None:
        """Run a module again for each sample's gradients of its parameters."""
        names = [name for name in call.names if name not in self.strays]
        if not names:
            return
        try:
            self._rerun(call, names, grad_out)
        except RerunError as error:
            module = original_class(call.rerun.module).__name__
            for name in names:
                self._stray(name, f"{module} cannot be run again for single samples: {error}")

    def _rerun(self, call: Call, names: list[str], grad_out: Tensor) -> None:
        """Hold the samples' gradients; what is large and has no other use is squared at once."""
        if call.trouble is not None:
            raise RerunError(call.trouble)
        if self.layouts.packing is not None and self.layouts.num_samples > 1:
            raise RerunError("its samples are packed")
        own, parts = self._call_alone(call)
        grad_out = self._output_alone(call, grad_out)
        output = None if call.output is None else self._output_alone(call, call.output)
        size = len(grad_out)
        large = {
            name
            for name in names
            if self.num_calls[name] == 1 and 4 * size * self.params[name].numel() > CHUNK_BYTES
        }
        held: dict[str, list[Tensor]] = {name: [] for name in names if name not in large}
        for start, grads in call.sample_grads(parts, own, grad_out, output):
            for name, each in held.items():
                each.append(grads[name])
            for name in large:
                self.squares.add_grads(name, start, grads[name])
        for name, each in held.items():
            self.add_sample_grads(name, each[0] if len(each) == 1 else torch.cat(each))
        if size > 1:
            call.rerun.checked.add(call.kind)

    def _call_alone(self, call: Call) -> tuple[list[bool], list[Tensor]]:
        """The call's tensors by sample, and which of them have a part for each."""
        own, parts = [], []
        for site, tensor in zip(call.sites, call.tensors, strict=True):
            layout = self.layouts.of(site, tuple(tensor.shape))
            several = self.layouts.num_samples > 1
            own.append(several and layout is not None)
            if several and layout is not None:
                tensor = self.layouts.alone(layout, tensor)
            elif several and not self.layouts.is_constant(site):
                raise RerunError(
                    f"the samples are not to be found in an input of shape {list(tensor.shape)}"
                )
            parts.append(tensor)
        return own, parts

    def _output_alone(self, call: Call, tensor: Tensor) -> Tensor:
        if self.layouts.num_samples == 1:
            return tensor.unsqueeze(0)
        layout = self.layouts.of(call.rerun.output, tuple(call.shape))
        if layout is None:
            raise RerunError(
                f"the samples are not to be found in its output of shape {list(call.shape)}"
            )
        return self.layouts.alone(layout, tensor)

    def add_sample_grads(self, name: str, grads: Tensor) -> None:
        """Hold a use of which each sample's gradient ``[N, *shape]`` is known already.

        They are added to those of the parameter's other uses, of whatever kind, before squaring.
        """
        if name not in self.strays:
            held = self.ready.get(name)
            self.ready[name] = grads if held is None else held + grads
            self.num_uses[name] += 1

    def _stray(self, name: str, reason: str) -> None:
        """Leave the parameter to another route; nothing of it may have been accumulated."""
        self.strays.add(name)
        self.reasons[name] = reason
        self._drop(name)
        if name in self.squares.done:
            self.spoiled.add(name)

    def _drop(self, name: str) -> None:
        for held in (self.uses, self.ready, self.head_rows):
            held.pop(name, None)

    @unwatched
    def _completed(self, name: str, grad: Tensor | None) -> None:
        self._differentiated()  # if this is no backward pass of ours
        if self.differentiated:
            return  # all that was held is dropped
        if grad is not None:
            self._stray(name, "it has a use that no rule sees, outside its module or within it")
        elif name in self.uses or name in self.ready:
            self.complete.add(name)
            if name in self.in_segments and self.num_calls[name] > self.num_uses[name]:
                return  # another segment may bring the rest: wait until the backward returns
            if name in self.ready or name in self.head_rows:
                self._accumulate([name])
                return
            # A layer's weight and bias are accumulated in one pass over x and grad_out.
            uses = self.uses[name]
            together = [n for n in uses[0].site.names.values() if n in self.uses]
            if any(len(self.uses[n]) > 1 or n in self.ready for n in together):
                self._accumulate([name])
            elif self.complete.issuperset(together):
                self._accumulate(together)

    @unwatched
    @torch.no_grad()  # as in the backward pass; x comes with the graph that made it
    def end_backward(self) -> None:
        """Accumulate what waited for the end of the pass; another over the graph may follow."""
        for name in [*self.uses, *self.ready]:
            if name in self.uses or name in self.ready:
                self._accumulate([name])
        self.complete.clear()
        self.num_uses.clear()
        self.head_rows.clear()

    def _accumulate(self, names: list[str]) -> None:
        """Join the uses of parameters that are used together, square, add."""
        if names[0] in self.head_rows:
            self._accumulate_lookups(names[0])
            return
        uses = self.uses.get(names[0], [])
        local = {n: {_local_name(use.site, n) for use in uses} for n in names}
        if self.ready.keys() & names or not _same_layer(uses) or max(map(len, local.values())) > 1:
            for name in names:
                self._accumulate_sums(name)
            return
        xs, grads = zip(*(self._tensors(use) for use in uses), strict=True)
        if any(len({tensor.shape[2:] for tensor in each}) > 1 for each in (xs, grads)):
            for name in names:  # images of several sizes through one convolution
                self._accumulate_sums(name)
            return
        rule, module = uses[0].site.rule, uses[0].site.module
        x, grad_out = _joined(xs), _joined(grads)
        self.squares.add_layer(rule, module, {local[n].pop(): n for n in names}, x, grad_out)
        for name in names:
            self._drop(name)

    def _accumulate_sums(self, name: str) -> None:
        """Uses of several kinds: the samples' gradients of each are added up, then squared.

        So many samples at once that the sums take no more room than what is held anyway.
        """
        uses, ready = self.uses.get(name, []), self.ready.get(name)
        tensors = [self._tensors(use) for use in uses]
        held = sum(tensor.numel() for pair in tensors for tensor in pair)
        at_once = (
            max(1, held // max(1, self.params[name].numel())) if uses else self.layouts.num_samples
        )
        for start in range(0, self.layouts.num_samples, at_once):
            part = slice(start, start + at_once)
            sums = None if ready is None else ready[part]
            for use, (x, grad_out) in zip(uses, tensors, strict=True):
                rule, wide = use.site.rule, torch.promote_types(grad_out.dtype, torch.float32)
                x = x[part].to(wide) if x.is_floating_point() else x[part]
                every = rule.sample_grads(use.site.module, x, grad_out[part].to(wide))
                grads = every[_local_name(use.site, name)]
                sums = grads if sums is None else sums + grads
            assert sums is not None
            self.squares.add_grads(name, start, sums)
        self._drop(name)

    def _tensors(self, use: _Use) -> tuple[Tensor, Tensor]:
        """The use's x and grad_out, ``[N, T, *features]`` each."""
        rule, module = use.site.rule, use.site.module
        x = self._samples_first(use, use.x, rule.input_dims(module))
        return x, self._samples_first(use, use.grad_out, rule.output_dims(module), fill=0.0)

    def _samples_first(
        self, use: _Use, tensor: Tensor, feature_dims: int | None, fill: float | None = None
    ) -> Tensor:
        layout = self.layouts.of(use.site, tuple(use.x.shape))
        assert layout is not None
        return self.layouts.samples_first(layout, tensor, feature_dims, fill)


def _same_layer(uses: Sequence[_Use]) -> bool:
    """Whether the modules of all uses compute the same."""
    if not uses:
        return True
    rule, settings = uses[0].site.rule, uses[0].site.rule.settings(uses[0].site.module)
    return all(
        use.site.rule is rule and rule.settings(use.site.module) == settings for use in uses[1:]
    )


def _joined(uses: tuple[Tensor, ...]) -> Tensor:
    """All uses along the token axis; of a single one no copy is made."""
    return uses[0] if len(uses) == 1 else torch.cat(uses, 1)


def _not_found(shape: torch.Size, module: nn.Module) -> str:
    kind = original_class(module).__name__
    return f"the samples are not to be found in an input of shape {list(shape)} of its {kind}"


def _local_name(site: Site, name: str) -> str:
    return next(local for local, full in site.names.items() if full == name)
