"""A training step that trains some of the layers' weights: fishkern's ways, and others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch

import fishkern
from benchmarks.contenders.training import (
    BADAM,
    FISHKERN,
    FISHKERN_COLUMNS,
    FISHKERN_DENSE,
    FLOOR,
    FUSED,
    LORA_EQUAL,
    WAYS,
    every_weight,
)
from benchmarks.harness import Case, Config, Run, Target, Times, Wrong
from benchmarks.workloads.finetuning import Finetuning, Footprint, Phases, Trainer, finetuning

TOLERANCE = 1e-5
FISHKERNS = (FISHKERN, FISHKERN_COLUMNS, FISHKERN_DENSE)
SMALL = {"batch": 3, "tokens": 9}  # of the gate
BASE = {"batch": 32, "tokens": 64, "dtype": "float32", "attention": "sdpa"}


def training(name: str) -> Callable[[Finetuning], Run]:
    """The contender that trains in this way; the workload remembers it."""

    def contender(work: Finetuning) -> Run:
        work.trainers[name] = WAYS[name](work)
        return work.trainers[name]

    return contender


def _target(what: str, density: float, metric: str, bound: float) -> Target:
    where = {"model": "minilm", "density": density, "batch": BASE["batch"]}
    return Target(f"training step, density {density}: {what}", where, FISHKERN, metric, bound)


class TrainingStep(Case):
    """Forward, backward and step of one batch, with dropout where the model has it, and without."""

    name = "training_step"
    baselines = (FUSED, LORA_EQUAL, FLOOR)
    contenders: ClassVar[Mapping[str, Callable[[Finetuning], Run]]] = {
        name: training(name) for name in WAYS
    }
    targets = (
        _target("time / AdamW(fused)", 0.005, f"ratio:{FUSED}", 0.77),
        _target("time / AdamW(fused)", 0.0005, f"ratio:{FUSED}", 0.71),
        *(
            target
            for density in (0.005, 0.0005)
            for target in (
                _target("time / LoRA of as many weights", density, f"ratio:{LORA_EQUAL}", 1.0),
                _target("kept for backward / LoRA's", density, f"kept_of:{LORA_EQUAL}", 0.9),
                _target("kept for backward / AdamW's", density, f"kept_of:{FUSED}", 0.7),
                _target("bytes per selected entry", density, "bytes_per_entry", 20),
            )
        ),
    )

    def sweep(self, suite: str, device: str) -> list[Config]:
        if suite == "tiny":
            small = {"batch": 4, "tokens": 8}
            return [{"model": "tiny", "density": 0.05, **BASE, **small}]
        if suite == "quick":
            return [{"model": "minilm", "density": 0.005, **BASE}]
        sweep = [
            {"model": model, "density": density, **BASE}
            for model in ("minilm", "bert-base-shaped", "llama-shaped")
            for density in (0.0005, 0.005, 0.05)
        ]
        return [*sweep[:2], *({**config, "dropout": 0.0} for config in sweep[:2]), *sweep[2:]]

    def setup(self, config: Config, device: str) -> Finetuning:
        return finetuning(config, device)

    def gate(self, config: Config, device: str, contender: str) -> None:
        """One step on a small batch: the gradients, and which weights it changes."""
        work = finetuning({**config, **SMALL}, device)
        trainer = WAYS[contender](work)
        trainer.model.eval()
        if trainer.mask is not None or contender == FUSED:
            check_gradients(trainer, work)
        check_step(trainer, work, contender)

    def metrics(
        self, config: Config, workload: Finetuning, times: Times
    ) -> Iterator[tuple[str, str, float]]:
        found = {name: workload.trainers[name].footprint() for name in times}
        for name, footprint in found.items():
            trainer = workload.trainers[name]
            yield name, "trained", float(trainer.trained)
            yield name, "head", float(trainer.head_size)
            for phase, seconds in zip(Phases._fields, trainer.medians(), strict=True):
                yield name, f"{phase}_ms", 1e3 * seconds
            yield name, "kept_mib", footprint.kept / 2**20
            yield name, "gradient_bytes", float(footprint.gradients)
            yield name, "held_bytes", float(footprint.held)
            yield name, "peak_mib", footprint.peak / 2**20
            yield name, "training_mib", (footprint.peak + footprint.held) / 2**20
            if trainer.trained:
                yield name, "bytes_per_entry", bytes_per_entry(trainer, footprint)
        for baseline in (FUSED, LORA_EQUAL):
            if {FISHKERN, baseline} <= set(found):
                own, other = found[FISHKERN], found[baseline]
                yield FISHKERN, f"kept_of:{baseline}", own.kept / other.kept
                yield (
                    FISHKERN,
                    f"memory_of:{baseline}",
                    (own.peak + own.held) / (other.peak + other.held),
                )

    def measures_memory(self, config: Config) -> bool:
        return False  # the footprint has the peak, exact to the byte


def bytes_per_entry(trainer: Trainer, footprint: Footprint) -> float:
    """Gradients and all that is held, for each number trained beside the head.

    The head's own gradients and moments are not counted.
    """
    head = 12 * trainer.head_size
    return (footprint.gradients + footprint.held - head) / trainer.trained


def check_gradients(trainer: Trainer, work: Finetuning) -> None:
    """Those of the layers' weights, or of their selected entries, against float64."""
    model = every_weight(work).model.double().eval()
    model(**work.batch).loss.backward()
    trainer.model(**work.batch).loss.backward()
    handle = fishkern.attached(trainer.model)
    leaves = handle.named_parameters() if handle else trainer.base.items()
    found = {name.replace("fishkern_leaves.", ""): leaf.grad for name, leaf in leaves}
    truth = {name: p.grad.flatten() for name, p in model.named_parameters() if name in work.mask}
    whole = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        grad = found.get(name)
        # The true gradients of the keys' biases are zero: what is left there is rounding.
        scale = max(expected.abs().max().item(), 1e-2 * whole)
        if handle is not None:
            expected = expected[trainer.mask[name].long()]
        if grad is None:
            if len(expected):
                raise Wrong(f"{name} has no gradient")
            continue
        error = (grad.flatten().double() - expected).abs().max().item() / scale
        if not error <= TOLERANCE:
            raise Wrong(f"{name}: error {error:.1e} of its largest gradient")
    trainer.model.zero_grad(set_to_none=True)


def check_step(trainer: Trainer, work: Finetuning, way: str) -> None:
    """A step changes whatever has a gradient, and of the model nothing else than it should."""
    mask = trainer.mask
    if way in FISHKERNS and trainer.trained != work.mask.num_selected:
        raise Wrong(f"trains {trainer.trained} weights, not {work.mask.num_selected}")
    base = {name: p.detach().clone() for name, p in trainer.base.items()}
    trainer.model(**work.batch).loss.backward()
    moving = {}  # what should change, and its values before
    names = {id(param): name for name, param in trainer.base.items()}
    for param in trainer.model.parameters():
        if param.grad is not None:
            has_gradient = (param.grad != 0).flatten()
            if mask is not None and (name := names.get(id(param), "")) in mask:
                has_gradient &= mask.dense(name).flatten()
            moving[param] = (has_gradient, param.detach().clone())
    trainer.optimizer.step()
    for param, (has_gradient, value) in moving.items():
        if has_gradient.any() and torch.equal(param, value):
            raise Wrong(f"a tensor of {param.numel()} numbers with a gradient was not trained")
    for name, value in base.items():
        changed = (trainer.base[name] != value).flatten()
        if name in work.head:
            continue
        if mask is not None and name in mask:
            changed[mask[name].long()] = False
        if changed.any() and not (name in work.mask and way in (FUSED, BADAM)):
            raise Wrong(f"{name}: {int(changed.sum())} entries have changed that are not trained")
