"""One run of the study: a model, an arm and a seed, trained and judged.

The seed decides the head, the order of the data, dropout and the samples that are scored; they are
the same for every arm. The head learns for ``WARMUP_STEPS`` before scores are taken and is then
put back.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fishkern
from benchmarks.harness import Missing, require
from benchmarks.studies.columns.arms import ARMS, EVERY, HEAD, LORA, Arm, captured, expected_work
from benchmarks.studies.columns.data import Examples, Task, load, weights_precision
from benchmarks.workloads import glue
from benchmarks.workloads.encoder import encoder
from benchmarks.workloads.masks import shares

HEAD_RATE = 1e-3
WARM_UP = 0.1  # of the steps
EVALUATED = 250  # examples at once
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is done; a row repeats it, so that what a file has is not done again."""

    task: str
    arm: str
    seed: int
    lr: float
    steps: int
    batch: int
    device: str


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    data: Path
    scores: Path  # a folder where scores of a task and seed are left for other processes
    model: str = "minilm"
    deadline: float = float("inf")  # of time.time()
    threads: int = 1


def perform(runs: Iterable[Run], settings: Settings) -> Iterator[Row]:
    """A row for each run, until the time is over.

    None is begun that would not end before it, if it took as long as the one before.
    What is not installed is said, and its runs are left out.
    """
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")
    last = 0.0  # seconds that a run took; the first has compiled kernels, too
    for run in runs:
        start = time.time()
        if start + last > settings.deadline:
            break
        try:
            found = finetune(run, settings)
        except Missing as reason:
            print(f"{run.arm}: {reason}", flush=True)
            continue
        last = time.time() - start
        yield asdict(run) | found | {"seconds": round(last, 1)}


def finetune(run: Run, settings: Settings) -> Row:
    """Train as the run says, and score dev and what was held out of train."""
    task, arm = read_task(settings.data, run.task, run.device), ARMS[run.arm]
    model = new_model(settings.model, task.classes, run.seed, run.device)
    mask = share = None
    if arm.density is not None:
        scores = fisher(run, settings)
        mask = arm.mask(scores, run.seed)
        share = round(captured(mask, scores), 4)
    optimizer = prepare(model, arm, mask, run)
    train(model, optimizer, task.train, run)
    used = {} if mask is None else {k: v.cpu() for k, v in mask.items()}
    return {
        "share": arm.share,
        "rule": arm.rule,
        "density": arm.density,
        "trained": count_beside_head(model) if mask is None else mask.num_selected,
        "dev": evaluate(model, task.dev, task.name),
        "held_out": evaluate(model, task.held_out, task.name),
        "columns": None if mask is None else round(shares(used, mask.shapes).columns, 4),
        "work": None if mask is None else round(expected_work(mask), 4),
        "captured": share,
        "weights": weights_precision() if settings.model == "minilm" else "random",
    }


@cache
def read_task(folder: Path, name: str, device: str) -> Task:
    """The task, read once by each process."""
    return load(folder, name, device)


@cache
def _pretrained(model: str, classes: int, device: str) -> Any:
    torch.manual_seed(0)  # for models that have no weights
    return encoder({"model": model}, classes).to(device)


def new_model(name: str, classes: int, seed: int, device: str) -> Any:
    """A copy of the pretrained model under the seed's head, in training mode."""
    model = copy.deepcopy(_pretrained(name, classes, device)).train()
    generator = torch.Generator().manual_seed(seed)
    drawn = 0.02 * torch.randn(model.classifier.weight.shape, generator=generator)
    with torch.no_grad():
        model.classifier.weight.copy_(drawn)
        model.classifier.bias.zero_()
    torch.manual_seed(seed)
    return model


def fisher(run: Run, settings: Settings) -> fishkern.FisherDiagonal:
    """Scores of the layers for the run's task and seed: read where some process left them."""
    path = settings.scores / f"{run.task}-{run.seed}.safetensors"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        score_layers(run, settings).save(part)
        part.replace(path)  # whole from the first moment on
    scores = fishkern.FisherDiagonal.load(path)
    moved = {name: score.to(run.device) for name, score in scores.items()}
    return fishkern.FisherDiagonal(moved, num_samples=scores.num_samples)


def score_layers(run: Run, settings: Settings) -> fishkern.FisherDiagonal:
    """Fisher scores on ``glue.SCORED`` samples, under a head that was warmed up."""
    task = read_task(settings.data, run.task, run.device)
    model = new_model(settings.model, task.classes, run.seed, run.device)
    glue.require_grad_only(model, _head(model))
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=HEAD_RATE)
    order = _order(len(task.train.ids), run.seed + 1000)
    samples, others = order[: glue.SCORED], order.roll(-glue.SCORED)
    for step in range(glue.WARMUP_STEPS):
        start = glue.WARMUP_BATCH * step % len(others)
        rows = others[start : start + glue.WARMUP_BATCH].to(run.device)
        model(**task.train.batch(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    glue.require_grad_only(model, glue.layer_parameters(model))
    batches = [task.train.batch(rows.to(run.device)) for rows in samples.split(32)]
    return fishkern.estimate_fisher(model, batches, verify=0, progress=False)


def prepare(
    model: Any, arm: Arm, mask: fishkern.SparseMask | None, run: Run
) -> torch.optim.Optimizer:
    """Let the arm's weights and the head be trained, each at its rate."""
    head, layers = _head(model), glue.layer_parameters(model)
    if mask is not None:
        glue.require_grad_only(model, head + layers)
        if run.device == "cpu":  # there the work counts; on a GPU the host's calls do
            fishkern.train_only(model, mask, unlisted="train")
        groups = _groups(model, head, run.lr, HEAD_RATE)
        return fishkern.FishSparseAdamW(groups, mask=mask, unlisted="train", weight_decay=0.0)
    if arm.name == LORA:
        peft = require("peft", "peft")
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        glue.require_grad_only(model, [])
        peft.inject_adapter_in_model(config, model)
        model.classifier.requires_grad_(True)
    else:
        glue.require_grad_only(model, head + layers if arm.name == EVERY else head)
    groups = _groups(model, head, run.lr, run.lr if arm.name == HEAD else HEAD_RATE)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def train(model: Any, optimizer: torch.optim.Optimizer, examples: Examples, run: Run) -> None:
    """So many steps, the rate rising and then falling in straight lines."""
    raised = max(1, round(WARM_UP * run.steps))
    schedule = LambdaLR(
        optimizer,
        lambda step: min((step + 1) / raised, (run.steps - step) / max(1, run.steps - raised)),
    )
    epochs = -(-run.steps * run.batch // len(examples.ids))
    orders = [_order(len(examples.ids), run.seed + 100 * epoch) for epoch in range(epochs)]
    rows = torch.cat(orders).to(run.device)
    torch.manual_seed(run.seed)  # dropout is the same whether or not scores were worked out before
    model.train()
    for step in range(run.steps):
        batch = examples.batch(rows[step * run.batch : (step + 1) * run.batch])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@torch.no_grad()
def evaluate(model: Any, examples: Examples, task: str) -> float:
    """Accuracy; Matthews' correlation for cola, Pearson's for stsb."""
    model.eval()
    parts = [slice(start, start + EVALUATED) for start in range(0, len(examples.ids), EVALUATED)]
    logits = torch.cat([model(**examples.batch(part)).logits.float() for part in parts])
    if task == "stsb":
        return correlation(logits[:, 0], examples.labels)
    guesses = logits.argmax(1)
    if task == "cola":  # Matthews' is Pearson's of two classes
        return correlation(guesses, examples.labels)
    return round((guesses == examples.labels).double().mean().item(), 5)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return round((a @ b).item() / norm, 5) if norm else 0.0


def count_beside_head(model: nn.Module) -> int:
    """How many numbers require a gradient and are not the head's, as of a mask."""
    head = _head(model)
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in head)


def _groups(model: nn.Module, head: list[str], lr: float, head_rate: float) -> list[dict[str, Any]]:
    """Named parameters of the layers at ``lr``, and of the head at its own rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = ((lr, False), (head_rate, True))
    groups = [
        {"params": [pair for pair in trained if (pair[0] in head) == is_head], "lr": rate}
        for rate, is_head in rates
    ]
    return [group for group in groups if group["params"]]


def _head(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith("classifier")]


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
