"""``estimate_fisher``: diagonal Fisher information of every candidate, in one pass a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishkern import samples
from fishkern.completion import FisherAccumulator, Shape
from fishkern.diagonal import FisherDiagonal
from fishkern.interception import Site, intercepted, original_parameters, rule_for
from fishkern.losses import LossFn, default_loss
from fishkern.names import Patterns, match, named_parameters
from fishkern.preserve import backward, scoring_mode
from fishkern.verification import FisherVerificationError, require_finite, verify_scores

__all__ = ["FisherVerificationError", "estimate_fisher"]

#: Reentrant checkpointing's warning that a segment gets no gradient.
_CUT_OFF = "None of the inputs have requires_grad"


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    params: Patterns | Callable[[str, nn.Parameter], bool] | None = None,
    num_samples: int | None = None,
    labels: str = "empirical",
    verify: int = 2,
    score_device: torch.device | str | None = None,
    progress: bool = True,
    generator: torch.Generator | None = None,
    process_group: Any = None,
) -> FisherDiagonal:
    """Score parameters by the diagonal of the empirical Fisher information.

    For each parameter ``F = 1/N sum_n (grad log p(y_n | x_n))^2``: a sample's gradient is summed
    over its tokens, then squared, then averaged over the samples (Sung et al., "Training Neural
    Networks with Fixed Sparse Masks", 2021; Xue et al., "FISH-Tuning", 2025, equation 3).

    The cost is that of one ordinary forward and backward a batch wherever a rule covers the layer
    ("fused" in ``.routes``): its weight-gradient product is replaced by a kernel that squares per
    sample. A parameter without a rule, or with a use that no rule saw, is scored by exact
    one-sample passes over the same batch ("loop").

    The model is scored without dropout and with its norms in eval mode, and is left as it was:
    gradients, buffers, modes, hooks, classes, random state.

    Args:
        model: Any module; DDP's and ``torch.compile``'s wrappers are looked through.
        batches: Iterated once. Mappings with the samples in dimension 0 of each tensor, given to
            the model as ``model(**batch)``, or anything that ``loss_fn`` understands.
        loss_fn: ``(model, batch) -> losses [N]``, each sample's own negative log-likelihood,
            summed over its tokens. None: from the output's ``.logits`` and ``batch["labels"]``.
        params: The candidates: globs, or a predicate ``(name, param) -> bool``. None: every
            parameter that requires a gradient.
        num_samples: Stop after exactly this many. The last mapping is cut; batches of another
            kind must end on the boundary. None: all of them.
        labels: "empirical": the data's labels.
        verify: So many samples of the first batch (and of the first with more than one sample)
            are scored again by one-sample autograd.
        score_device: Where scores accumulate; None: beside each parameter.
        progress: Show a progress bar.
        generator: For drawn labels.
        process_group: Sum over the ranks of this group; None: this process alone.

    Returns:
        A mapping from names (as in ``model.named_parameters()``, wrappers' prefixes stripped, a
        tied weight once) to float32 scores of the parameters' shapes. A parameter that took no
        part has zeros.

    Raises:
        TypeError: An argument of another type than above.
        ValueError: No candidate, no sample, a batch or loss that does not fit.
        FisherVerificationError: The re-scored samples disagree.
        RuntimeError: Scores overflowed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> fisher = estimate_fisher(model, batches, loss_fn=loss_fn, progress=False)
        >>> fisher["weight"].shape, fisher.num_samples, fisher.routes["weight"]
        (torch.Size([2, 3]), 8, 'fused')
    """
    if labels != "empirical":
        raise ValueError(f"labels is {labels!r}: only 'empirical' is available in this version")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass an nn.Module")
    if not isinstance(num_samples, int | None):
        raise TypeError(f"num_samples is {num_samples!r}: pass an int, or None for all")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: pass at least 1, or None for all")
    if verify < 0:
        raise ValueError(f"verify is {verify}: pass 0 to switch it off")
    model = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(original_parameters(model))
        candidates = _candidates(model, params)
        stack.enter_context(scoring_mode(model, candidates.values()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", _CUT_OFF)
        scoring = _Scoring(model, candidates, loss_fn or default_loss(model), score_device)
        bar = stack.enter_context(
            tqdm(total=num_samples, desc="Fisher scores", unit="sample", disable=not progress)
        )
        for batch, size in _cut(batches, num_samples, model, loss_fn is None):
            if scoring.num_samples == 0 and verify:
                scoring.verify(batch, size, verify)
            size = scoring.add(batch, size)
            if verify and not scoring.verified and size > 1:
                scoring.verify(batch, size, verify)  # a single sample cannot mix with others
            bar.update(size)
            if num_samples is not None and scoring.num_samples >= num_samples:
                break
        total = _reduce(scoring, process_group)
    if total == 0:
        raise ValueError("batches held no samples: pass at least one batch")
    if num_samples is not None and scoring.num_samples > num_samples:
        raise ValueError(
            f"num_samples is {num_samples}, inside a batch that ends at {scoring.num_samples}: "
            f"only mappings of tensors can be cut; choose a batch boundary"
        )
    if num_samples is not None and scoring.num_samples < num_samples:
        warnings.warn(
            f"num_samples is {num_samples}, but batches ended after {scoring.num_samples}",
            UserWarning,
            stacklevel=2,
        )
    return _finished(scoring, total, labels)


class _Scoring:
    """The passes over one batch, and what is known about the model from earlier ones."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, nn.Parameter],
        loss_fn: LossFn,
        score_device: torch.device | str | None,
    ) -> None:
        self.model, self.candidates, self.loss_fn = model, candidates, loss_fn
        self.scores = {
            name: torch.zeros(param.shape, dtype=torch.float32, device=score_device or param.device)
            for name, param in candidates.items()
        }
        self.accumulator = FisherAccumulator(candidates, self.scores)
        self.sites = self._find_sites()
        covered = {name for site in self.sites.values() for name in site.names.values()}
        self.loop = set(candidates) - covered
        self.probed = self.verified = False
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

    def add(self, batch: Any, size: int | None) -> int:
        """Score one batch by every route; how many samples it held."""
        size, strays = self._fused_pass(batch, size)
        if spoiled := self.accumulator.spoiled:
            # Reentrant checkpointing runs the backward by segments: a use that no rule saw came
            # after the others had been accumulated.
            if self.num_samples:
                raise RuntimeError(
                    f"{sorted(spoiled)} are used outside their modules in a later batch only, "
                    f"under reentrant checkpointing: use checkpointing with use_reentrant=False"
                )
            for name in spoiled:
                self.scores[name].zero_()
        self.loop |= strays
        self.one_sample_passes(batch, size, range(size), self.loop, self._add_square)
        self.num_samples += size
        return size

    def verify(self, batch: Any, size: int | None, count: int) -> None:
        """Compare a few samples, scored inside their whole batch, with one-sample autograd."""
        before = {n: s.clone() for n, s in self.scores.items()} if self.num_samples else {}
        self._zero_scores()
        size, strays = self._fused_pass(batch, size, count)
        self.loop |= strays
        self.verified = size > 1
        fused = sorted(set(self.candidates) - self.loop)
        verify_scores(self, batch, size, min(count, size), fused)
        self._zero_scores()
        for name, scores in before.items():
            self.scores[name].copy_(scores)

    def _zero_scores(self) -> None:
        for scores in self.scores.values():
            scores.zero_()

    def _fused_pass(
        self, batch: Any, size: int | None, only: int | None = None
    ) -> tuple[int, set[str]]:
        """One forward and backward; of its first ``only`` samples if given. Size and strays."""
        names = [name for name in self.candidates if name not in self.loop]
        if not names and size is not None:
            return size, set()
        self._require_grad(names)
        accumulator = self.accumulator
        sites = {m: s for m, s in self.sites.items() if not self.loop.issuperset(s.names.values())}
        with accumulator.batch(names, size if self.broadcasts else None), intercepted(sites):
            try:
                losses = self._losses(batch, size)
                one_sample, same = None, True
                if not self.probed and len(losses) > 1:
                    one_sample, same = self._first_sample(batch, losses.detach())
                    self.probed = True
            except Exception:
                if not accumulator.expanded:
                    raise
                same = False  # perhaps by what was expanded; if not, the error comes again
            if same or not accumulator.expanded:
                accumulator.end_forward(len(losses), one_sample)
                if losses.requires_grad:
                    backward(losses[:only].sum())
                self._clear_grads()
                return len(losses), accumulator.strays
        self.broadcasts = self.probed = False
        return self._fused_pass(batch, size, only)

    def _first_sample(self, batch: Any, losses: Tensor) -> tuple[dict[Site, list[Shape]], bool]:
        """All inputs' shapes when the first sample runs alone; whether its loss is as here."""
        accumulator, alone = self.accumulator, losses
        before = accumulator.calls, accumulator.num_calls.copy(), accumulator.broadcast
        accumulator.calls, accumulator.broadcast = {}, None
        try:
            if samples.can_slice(batch):
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", _CUT_OFF)  # no gradient is wanted here
                    alone = self.loss_fn(self.model, samples.take(batch, 0, 1, len(losses)))
            same = torch.allclose(alone[:1].float(), losses[:1].float(), 5e-2, 1e-3)
            return accumulator.calls, same
        finally:
            accumulator.calls, accumulator.num_calls, accumulator.broadcast = before

    def one_sample_passes(
        self,
        batch: Any,
        size: int,
        chosen: Iterable[int],
        names: Iterable[str],
        use: Callable[[str, Tensor], None],
    ) -> None:
        """Plain autograd, a sample at a time: ``use(name, gradient)`` for each parameter."""
        names = [name for name in self.candidates if name in set(names)]
        if not names:
            return
        self._require_grad(names)
        losses = None if samples.can_slice(batch) else self._losses(batch, size)
        for n in chosen:
            if losses is not None:  # a batch that only loss_fn can read: one graph, N backwards
                loss = losses[n]
            else:
                loss = self._losses(samples.take(batch, n, n + 1, size), 1).sum()
            if loss.requires_grad:
                backward(loss, retain_graph=losses is not None)
            for name in names:
                param = self.candidates[name]
                if param.grad is not None:
                    use(name, param.grad.detach())
            self._clear_grads()

    def _add_square(self, name: str, grad: Tensor) -> None:
        scores = self.scores[name]
        scores += grad.to_dense().to(scores).square()

    def _losses(self, batch: Any, size: int | None) -> Tensor:
        losses = self._call_loss_fn(batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn returned {found}: return one loss per sample, a tensor [N] "
                f'(reduction="none", then a sum over tokens)'
            )
        if size is not None and len(losses) != size:
            raise ValueError(
                f"loss_fn returned {len(losses)} losses for a batch of {size} samples: "
                f"return one loss per sample"
            )
        return losses

    def _call_loss_fn(self, batch: Any) -> Any:
        """The caller's losses, with the gradient of every candidate asked for where it must be.

        Reentrant checkpointing gives none to a segment of which no input requires one, and only
        warns: what comes before the segment may be frozen just for this pass.
        """
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(_CUT_OFF):
                raise
        self._require_grad(self.candidates)
        self.accumulator.forget_calls()
        try:
            return self.loss_fn(self.model, batch)
        except UserWarning as warning:
            if not str(warning).startswith(_CUT_OFF):
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
        return {name: "loop" if name in self.loop else "fused" for name in self.candidates}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's, DataParallel's and ``torch.compile``'s wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _candidates(model: nn.Module, params: Any) -> dict[str, nn.Parameter]:
    known = named_parameters(model)
    if params is None:
        chosen = [name for name, param in known.items() if param.requires_grad]
        if not chosen:
            raise ValueError(
                "no parameter requires a gradient: call requires_grad_(True) on those to score, "
                "or name them with params="
            )
    else:
        chosen = match(known, params, "params")
        if not chosen:
            raise ValueError("params holds no pattern: pass None for all that require a gradient")
    for name in chosen:
        param = known[name]
        if not param.is_floating_point():
            raise ValueError(
                f"{name!r} has dtype {param.dtype}: quantised and integer weights have no "
                f"gradient; leave it out of params="
            )
        if hasattr(param, "placements"):
            raise ValueError(f"{name!r} is sharded (DTensor): score the model before sharding it")
    return {name: known[name] for name in chosen}


def _cut(
    batches: Iterable[Any], num_samples: int | None, model: nn.Module, move: bool
) -> Iterator[tuple[Any, int | None]]:
    """Each batch with its size (None where only loss_fn can tell), ``num_samples`` in all."""
    device = next(model.parameters()).device
    left = num_samples
    for batch in batches:
        if not isinstance(batch, Mapping):
            yield batch, None  # _Scoring counts its losses; the boundary is checked there
            continue
        size = samples.count(batch)
        if left is not None and size > left:
            batch, size = samples.take(batch, 0, left, size), left
        if move:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        yield batch, size
        left = None if left is None else left - size


def _reduce(scoring: _Scoring, process_group: Any) -> int:
    """Sum scores and counts over the group's ranks; the number of samples of all."""
    if process_group is None:
        return scoring.num_samples
    import torch.distributed as dist

    for scores in scoring.scores.values():
        dist.all_reduce(scores, group=process_group)
    device = next(iter(scoring.scores.values())).device
    total = torch.tensor(scoring.num_samples, device=device)
    dist.all_reduce(total, group=process_group)
    return int(total.item())


def _finished(scoring: _Scoring, total: int, labels: str) -> FisherDiagonal:
    for scores in scoring.scores.values():
        scores /= total
    require_finite(scoring.scores)
    return FisherDiagonal(scoring.scores, num_samples=total, labels=labels, routes=scoring.routes())
