"""The passes over a batch in which parameters are scored: fused, and sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.batches import samples
from fishkern.batches.losses import LossFn, require_losses
from fishkern.batches.packing import packing_of
from fishkern.interception import Site, elementwise, intercepted, original_class, rule_for
from fishkern.interception.rerun import Rerun, find_reruns, rerunning
from fishkern.scoring.accumulator import FisherAccumulator
from fishkern.scoring.layouts import Noted
from fishkern.scoring.placement import SumsByLayer, misplaced, sample_weights
from fishkern.scoring.preserve import backward
from fishkern.scoring.sample_scores import SampleScores
from fishkern.scoring.verification import check_losses, verify_scores

#: Reentrant checkpointing's warning that a segment gets no gradient.
CUT_OFF = "None of the inputs have requires_grad"


def _own_terms(losses: Tensor) -> list[Tensor]:
    return [term.sum() for term in losses]


def _nothing(_: int) -> None:
    pass


class Scoring:
    """The passes over one batch, and what is known about the model from earlier ones."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Parameter],
        loss_fn: LossFn,
        score_device: torch.device | str | None,
        labels: str = "empirical",
        by_sample: SampleScores | None = None,
    ) -> None:
        self.model, self.candidates, self.loss_fn = model, candidates, loss_fn
        self.by_sample = by_sample
        self.labels = labels
        self.scores = {
            name: torch.zeros(param.shape, dtype=torch.float32, device=score_device or param.device)
            for name, param in candidates.items()
        }
        self.accumulator = FisherAccumulator(candidates, self.scores, by_sample)
        self.sites = self._find_sites()
        self.elementwise = self._find_elementwise()
        self.reruns: list[Rerun] = []
        self.loop: set[str] = set()
        self.probed = self.verified = self.attached = False
        #: Whether the losses are made of gradients that loss_fn or the model takes itself.
        self.differentiates = False
        self.reasons: dict[str, str] = {}
        self.packed: bool | None = None
        # Position ids [1, T] stand for all samples; expanded to [N, T], their gradients come sample
        # by sample. Off where the model turns out to want them as they are.
        self.broadcasts = True
        self.num_samples = 0

    def _find_sites(self) -> dict[nn.Module, Site]:
        names = {id(param): name for name, param in self.candidates.items()}
        sites = {}
        for module in self.model.modules():
            rule = rule_for(module)
            if rule is None:
                continue
            local = {
                n: names[id(p)]
                for n in rule.params
                if (p := module._parameters.get(n)) is not None and id(p) in names
            }
            if local:
                sites[module] = Site(
                    module, rule, local, self.accumulator.consume, self.accumulator.called
                )
        return sites

    def _find_elementwise(self) -> list[Site]:
        """A site for each parameter without a rule: perhaps it meets activations elementwise."""
        names = {id(param): name for name, param in self.candidates.items()}
        covered = {(m, n) for m, site in self.sites.items() for n in site.names}
        accumulator = self.accumulator
        return [
            Site(m, elementwise.RULE, {n: names[id(p)]}, accumulator.consume, accumulator.called)
            for m in self.model.modules()
            for n, p in m._parameters.items()
            if not hasattr(type(m), n)  # whoever reads it finds the class's own
            # An embedding with max_norm writes to its weight: nothing may stand in for it.
            if id(p) in names and (m, n) not in covered and getattr(m, "max_norm", None) is None
        ]

    def add_verified(self, batch: Any, size: int | None, count: int) -> int:
        """``add``; the first batch, and the first of several samples, are checked."""
        if count and self.num_samples == 0:
            self.verify(batch, size, count)
        size = self.add(batch, size)
        if count and not self.verified and size > 1:
            self.verify(batch, size, count)  # a single sample cannot mix with others
        return size

    def add(self, batch: Any, size: int | None) -> int:
        """Score one batch by every route; how many samples it held."""
        size, strays = self._fused_pass(batch, size)
        if size == 0:
            return 0
        if self.num_samples == 0 and self._run_again_for(strays):
            self._zero_scores()
            return self.add(batch, size)
        if spoiled := self.accumulator.spoiled:
            # A use that no rule saw came after others had been accumulated: a tied head's at its
            # turn, and those in a segment of reentrant checkpointing, which has its own backward.
            if self.num_samples:
                raise RuntimeError(
                    f"{sorted(spoiled)} are used outside their modules in a later batch only, "
                    f"where a tied head or reentrant checkpointing has no way back: let the first "
                    f"batch be one with such a use, or checkpoint with use_reentrant=False"
                )
            self._zero_scores()
            self._leave(strays)
            return self.add(batch, size)
        self._leave(strays)
        for name in self.accumulator.tied:
            self.scores[name].clamp_(min=0.0)
        self.one_sample_passes(batch, size, range(size), self.loop, self._add_square)
        if self.by_sample is not None:
            self.by_sample.end()
        self.num_samples += size
        return size

    def verify(self, batch: Any, size: int | None, count: int) -> None:
        """Compare a few samples, scored inside their whole batch, with one-sample autograd."""
        before = {n: s.clone() for n, s in self.scores.items()} if self.num_samples else {}
        self._zero_scores()
        weights, sums = torch.ones(1), list[Mapping[tuple[str, ...], Tensor]]()

        def terms(losses: Tensor) -> list[Tensor]:
            nonlocal weights
            whole = losses.sum(0)
            weights = sample_weights(whole.detach())
            return [whole.sum(), (whole * weights).sum(), *losses[:, :count].sum(1)]

        def ended(term: int) -> None:
            if term < 2:
                sums.append(by_layer.take())
                self._zero_scores()

        with self._collected(SumsByLayer()) as by_layer:
            size, strays = self._fused_pass(batch, size, terms, ended)
            while self._run_again_for(strays):
                self._zero_scores()
                sums.clear()
                size, strays = self._fused_pass(batch, size, terms, ended)
        if size == 0:
            return
        self._leave(strays)
        self.verified = size > 1
        count = min(count, size)
        narrow = check_losses(self, batch, size, count)
        if sums and size > 1:
            entries = {name: param.numel() for name, param in self.candidates.items()}
            wrong = misplaced(sums[0], sums[1], weights, entries, 0.2 if narrow else 1e-3)
            self._leave(wrong, "its layer's gradients do not follow the samples' losses in order")
            self.probed = self.probed and not wrong
        fused = sorted(set(self.candidates) - self.loop)
        verify_scores(self, batch, size, count, fused, narrow)
        self._zero_scores()
        for name, scores in before.items():
            self.scores[name].copy_(scores)

    def _run_again_for(self, strays: set[str]) -> bool:
        """Run modules again for those of the strays that have no rule; whether there are any."""
        ruled = {name for site in self.sites.values() for name in site.names.values()}
        free = {name for site in self.elementwise for name in site.names.values()} - ruled
        if not strays & free:
            return False
        before = {n for rerun in self.reruns for n in rerun.params} - self.loop - strays
        wanted = before | (strays & free)
        params = {name: param for name, param in self.candidates.items() if name in wanted}
        reruns = find_reruns(
            self.model, params, self.accumulator.consume_rerun, self.accumulator.called
        )
        names = {name for rerun in reruns for name in rerun.params}
        if names <= before:
            return False
        self.elementwise = [s for s in self.elementwise if names.isdisjoint(s.names.values())]
        self.reruns, self.probed = reruns, False
        return True

    @contextmanager
    def _collected(self, by_sample: SumsByLayer) -> Iterator[SumsByLayer]:
        """These sums by sample, in place of those that were asked for."""
        asked = self.by_sample
        self.by_sample = self.accumulator.by_sample = by_sample
        try:
            yield by_sample
        finally:
            self.by_sample = self.accumulator.by_sample = asked

    def restart(self, by_sample: SampleScores | None) -> None:
        """Forget all scores, not what is known of the model, and collect these sums by sample."""
        self._zero_scores()
        self.num_samples = 0
        self.by_sample = self.accumulator.by_sample = by_sample

    def _zero_scores(self) -> None:
        for scores in self.scores.values():
            scores.zero_()

    def _fused_pass(
        self,
        batch: Any,
        size: int | None,
        terms: Callable[[Tensor], list[Tensor]] = _own_terms,
        ended: Callable[[int], None] = _nothing,
    ) -> tuple[int, set[str]]:
        """A forward, a backward for each of the losses' ``terms``; how many samples, and strays.

        ``ended`` is told when the backward of each is done.
        """
        names = [name for name in self.candidates if name not in self.loop]
        if not names:
            size = self._size(batch) if size is None else size
            self._begin_samples(size)
            return size, set()
        self._require_grad(names)
        accumulator = self.accumulator
        sites = {m: s for m, s in self.sites.items() if not self.loop.issuperset(s.names.values())}
        others = [site for site in self.elementwise if self.loop.isdisjoint(site.names.values())]
        reruns = [rerun for rerun in self.reruns if not self.loop.issuperset(rerun.params)]
        packing = packing_of(batch)
        if self.packed not in (None, packing is not None):
            raise ValueError("sample_ids are in some batches only: pass them in all, or in none")
        self.packed = packing is not None
        # Of packed samples ids [1, T] are all the tokens that there are.
        broadcast = size if self.broadcasts and packing is None else None
        with (
            accumulator.batch(names, broadcast, packing),
            intercepted(sites),
            elementwise.tracked(others, accumulator.consume_elementwise),
            rerunning(reruns),
        ):
            try:
                losses = self._losses(batch, size)
                found = losses.shape[1]
                if found == 0:
                    return 0, set()
                first, same = None, True
                if not self.probed and found > 1:
                    first, same = self._first_sample(batch, losses.detach())
                    self.probed = True
            except Exception:
                if not (accumulator.expanded or accumulator.differentiated):
                    raise
                same = False  # perhaps by what was expanded; if not, the error comes again
            if not accumulator.differentiated and (same or not accumulator.expanded):
                alone = partial(self._noted_alone, batch, found)
                counts = samples.token_counts(batch, found)
                accumulator.layouts.end_forward(found, first, alone, counts)
                self._begin_samples(found)
                each = terms(losses)
                for k, term in enumerate(each):
                    self._backward(term, batch, retain_graph=k + 1 < len(each))
                    accumulator.end_backward()
                    self._clear_grads()
                    ended(k)
                if not self.loop.issuperset(accumulator.strays):
                    # Constants from now on: others may meet them where they met activations.
                    self.probed = False
                return found, accumulator.strays
        if accumulator.differentiated:
            self.differentiates = True
            self._leave(set(self.candidates), "loss_fn or the model takes gradients itself")
        else:
            self.broadcasts = self.probed = False
        return self._fused_pass(batch, size, terms, ended)

    @contextmanager
    def _without_graph(self) -> Iterator[None]:
        """No gradient is wanted, so none is missed by a checkpointed segment."""
        with torch.set_grad_enabled(self.differentiates), warnings.catch_warnings():
            warnings.filterwarnings("ignore", CUT_OFF)
            yield

    def _leave(self, names: set[str], reason: str | None = None) -> None:
        """From here on these parameters are scored by one-sample passes."""
        for name in names - self.loop:
            self.reasons[name] = reason or self.accumulator.reasons[name]
        self.loop |= names

    def _begin_samples(self, size: int) -> None:
        if self.by_sample is not None:
            self.by_sample.begin(size)

    def _first_sample(self, batch: Any, losses: Tensor) -> tuple[Noted, bool]:
        """What is noted when the first sample runs alone; whether its loss is as here."""
        alone, noted = self._alone(batch, losses.shape[1], 0)
        if alone.shape[-1:] != (1,):
            return noted, not samples.can_slice(batch)
        return noted, torch.allclose(alone.float(), losses[:, :1].float(), 5e-2, 1e-3)

    def _noted_alone(self, batch: Any, size: int, n: int) -> Noted:
        """What is noted when sample n runs alone."""
        return self._alone(batch, size, n)[1]

    def _alone(self, batch: Any, size: int, n: int) -> tuple[Tensor, Noted]:
        """Sample n's loss without the others, and what is noted of it; nothing if not cut."""
        loss = torch.empty(0)
        with self.accumulator.aside() as noted:
            if samples.can_slice(batch):
                with self._without_graph():
                    one = samples.take(batch, n, n + 1, size)
                    loss = elementwise.settled(self.loss_fn(self.model, one))
        return loss, noted

    def one_sample_passes(
        self,
        batch: Any,
        size: int,
        chosen: Iterable[int],
        names: Iterable[str],
        use: Callable[[int, str, Tensor], None],
    ) -> None:
        """Plain autograd, a sample at a time: ``use(n, name, gradient)`` for each parameter."""
        names = [name for name in self.candidates if name in set(names)]
        if not names:
            return
        self._require_grad(names)
        chosen = list(chosen)
        each = self._each_loss(batch, size, chosen)
        for n, (terms, shared) in zip(chosen, each, strict=True):
            for k, term in enumerate(terms):
                self._backward(term, batch, retain_graph=shared or k + 1 < len(terms))
                for name in names:
                    param = self.candidates[name]
                    if param.grad is not None:
                        use(n, name, param.grad.detach())
                self._clear_grads()

    def losses_alone(self, batch: Any, size: int, chosen: Iterable[int]) -> list[Tensor]:
        """The losses of the one-sample passes, without a graph."""
        with self._without_graph():
            return [terms.detach().sum() for terms, _ in self._each_loss(batch, size, chosen)]

    def _each_loss(
        self, batch: Any, size: int, chosen: Iterable[int]
    ) -> Iterator[tuple[Tensor, bool]]:
        """The chosen samples' terms [K], each of a batch of its own; whether they share a graph.

        They do where only loss_fn can read the batch: one graph, N backwards.
        """
        whole = None if samples.can_slice(batch) else self._losses(batch, size)
        for n in chosen:
            if whole is None:
                part = samples.take(batch, n, n + 1, size)
                objects = samples.holds_objects(batch)
                losses = self._losses(part, None if objects else 1)
                if losses.shape[1] == 1:
                    yield losses[:, 0], False
                    continue
                whole = self._losses(batch, size)  # the samples are in the batch's objects
            yield whole[:, n], True

    def batch_losses(self, batch: Any, size: int) -> Tensor:
        """All losses [N] of the batch, without a graph."""
        with self._without_graph():
            return self._losses(batch, size).detach().sum(0)

    def _add_square(self, n: int, name: str, grad: Tensor) -> None:
        scores = self.scores[name]
        square = grad.to_dense().to(scores).square()
        if self.by_sample is None:
            scores += square
        else:
            self.by_sample.add_squares(name, scores, n, square[None])

    def _backward(self, loss: Tensor, batch: Any, retain_graph: bool = False) -> None:
        if loss.requires_grad:
            self.attached = True
            backward(loss, self.candidates.values(), retain_graph)
        elif not self.attached:
            # Perhaps none of these parameters took part: would any other?
            flags = [(param, param.requires_grad) for param in self.model.parameters()]
            for param, _ in flags:
                param.requires_grad_(param.is_floating_point() or param.is_complex())
            self.attached = self._call_loss_fn(batch).requires_grad
            for param, flag in flags:
                param.requires_grad_(flag)
            if not self.attached:
                raise ValueError(
                    "the losses require no gradient: compute them from the model's outputs in "
                    "loss_fn without detach(), item() or no_grad()"
                )

    def _size(self, batch: Any) -> int:
        with self._without_graph():
            return self._losses(batch, None).shape[1]

    def _losses(self, batch: Any, size: int | None) -> Tensor:
        """``[K, N]``: a sample's score is the sum of its K terms' squared gradients.

        K is 1, a sample's own loss, but for expected labels (``labels.expected_terms``).
        """
        losses = elementwise.settled(self._call_loss_fn(batch))
        if self.labels == "expected":
            terms: Tensor = losses
            return terms
        return require_losses(losses, batch, size)[None]

    def _call_loss_fn(self, batch: Any) -> Any:
        """The caller's losses, with the gradient of every candidate asked for where it must be.

        Reentrant checkpointing gives none to a segment of which no input requires one, and only
        warns: what comes before the segment may be frozen just for this pass.
        """
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(CUT_OFF):
                raise
        self._require_grad(self.candidates)
        self.accumulator.forget_calls()
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(CUT_OFF):
                raise
            raise RuntimeError(
                "reentrant checkpointing cuts off the gradient of a segment whose inputs require "
                "none: checkpoint with use_reentrant=False, or call "
                "model.enable_input_require_grads()"
            ) from warning

    def _require_grad(self, names: Iterable[str]) -> None:
        """Only these parameters need a gradient: nothing is computed for any other."""
        for param in self.model.parameters():
            param.requires_grad_(False)
        for name in names:
            self.candidates[name].requires_grad_(True)

    def _clear_grads(self) -> None:
        for param in self.candidates.values():
            param.grad = None

    def routes(self) -> dict[str, str]:
        """Which way each candidate was scored."""
        routes = dict.fromkeys(self.candidates, "fused")
        for rerun in self.reruns:  # where vmap cannot run the module, it is looped over
            routes |= dict.fromkeys(rerun.params, "vmap" if rerun.reason is None else "loop")
        return routes | dict.fromkeys(self.loop, "loop")

    def why(self) -> dict[str, str]:
        """For each candidate that was not fused the reason."""
        reasons: dict[str, str] = {}
        for rerun in self.reruns:
            reason = f"no rule covers its {original_class(rerun.module).__name__}"
            if rerun.reason is not None:
                reason += f", which cannot be run for all samples at once: {rerun.reason}"
            reasons |= dict.fromkeys(rerun.params, reason)
        reasons |= {name: self.reasons[name] for name in self.loop}
        return {name: reasons[name] for name in self.candidates if name in reasons}
