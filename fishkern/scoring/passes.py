"""The passes over a batch in which parameters are scored: fused, and sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fishkern.batches import samples
from fishkern.batches.losses import LossFn
from fishkern.batches.packing import packing_of
from fishkern.interception import Site, elementwise, intercepted, original_class, rule_for
from fishkern.interception.find_reruns import find_reruns
from fishkern.interception.rerun import Rerun, rerunning
from fishkern.scoring.accumulator import FisherAccumulator
from fishkern.scoring.layouts import Noted
from fishkern.scoring.one_sample import OneSamplePasses
from fishkern.scoring.placement import SumsByLayer, misplaced, sample_weights
from fishkern.scoring.sample_scores import SampleScores
from fishkern.scoring.squares import Squares
from fishkern.scoring.verification import check_losses, verify_scores


def _own_terms(losses: Tensor) -> list[Tensor]:
    return [term.sum() for term in losses]


def _nothing(_: int) -> None:
    pass


class Scoring(OneSamplePasses):
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
        super().__init__(model, candidates, loss_fn, labels)
        self.scores = {
            name: torch.zeros(param.shape, dtype=torch.float32, device=score_device or param.device)
            for name, param in candidates.items()
        }
        self.squares = Squares(self.scores, by_sample)
        self.accumulator = FisherAccumulator(candidates, self.squares)
        self.sites = self._find_sites()
        self.elementwise = self._find_elementwise()
        self.reruns: list[Rerun] = []
        self.loop: set[str] = set()
        self.probed = self.verified = False
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
            self.squares.zero()
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
            self.squares.zero()
            self._leave(strays)
            return self.add(batch, size)
        self._leave(strays)
        for name in self.accumulator.tied:
            self.scores[name].clamp_(min=0.0)
        self.one_sample_passes(batch, size, range(size), self.loop, self.squares.add_grad)
        if self.squares.by_sample is not None:
            self.squares.by_sample.end()
        self.num_samples += size
        return size

    def verify(self, batch: Any, size: int | None, count: int) -> None:
        """Compare a few samples, scored inside their whole batch, with one-sample autograd."""
        before = {n: s.clone() for n, s in self.scores.items()} if self.num_samples else {}
        self.squares.zero()
        weights, sums = torch.ones(1), list[Mapping[tuple[str, ...], Tensor]]()

        def terms(losses: Tensor) -> list[Tensor]:
            nonlocal weights
            whole = losses.sum(0)
            weights = sample_weights(whole.detach())
            return [whole.sum(), (whole * weights).sum(), *losses[:, :count].sum(1)]

        def ended(term: int) -> None:
            if term < 2:
                sums.append(by_layer.take())
                self.squares.zero()

        with self._collected(SumsByLayer()) as by_layer:
            size, strays = self._fused_pass(batch, size, terms, ended)
            while self._run_again_for(strays):
                self.squares.zero()
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
        verify_scores(self, self.scores, batch, size, count, fused, narrow)
        self.squares.zero()
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
        asked, self.squares.by_sample = self.squares.by_sample, by_sample
        try:
            yield by_sample
        finally:
            self.squares.by_sample = asked

    def restart(self, by_sample: SampleScores | None) -> None:
        """Forget all scores, not what is known of the model, and collect these sums by sample."""
        self.squares.zero()
        self.num_samples = 0
        self.squares.by_sample = by_sample

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
            except Exception:  # perhaps by what was expanded; if not, the error comes again
                if not (accumulator.expanded or accumulator.differentiated):
                    raise
                same = False
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

    def _leave(self, names: set[str], reason: str | None = None) -> None:
        """From here on these parameters are scored by one-sample passes."""
        for name in names - self.loop:
            self.reasons[name] = reason or self.accumulator.reasons[name]
        self.loop |= names

    def _begin_samples(self, size: int) -> None:
        if self.squares.by_sample is not None:
            self.squares.by_sample.begin(size)

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

    def _size(self, batch: Any) -> int:
        with self._without_graph():
            return self._losses(batch, None).shape[1]

    def _forward_again(self) -> None:
        self.accumulator.forget_calls()

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
