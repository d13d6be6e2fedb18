"""The quickstart's training loop and stopwatch, the same for each of its methods."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from _data import Data, Example, shuffled
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import fishkern

Batch = dict[str, Tensor]

MAX_TOKENS = 48
SCORED, LOOPED = 128, 8  # samples: so many are scored, and by the one-sample loop
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

logging.set_verbosity_error()  # it would report the head, which is new and has to be
logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT's word for it is older


@dataclass
class Run:
    """One way of training, and what it cost."""

    what: str
    optimizer: str
    lr: float
    trained: int = 0  # weights, without the head's
    head: int = 0
    mask: fishkern.SparseMask | None = None
    scoring_ms: float | None = None  # per sample
    loop_ms: float | None = None  # per sample, by the one-sample loop
    step_ms: list[float] = field(default_factory=list)  # forward, backward and optimizer
    optimizer_ms: list[float] = field(default_factory=list)
    bytes: int = 0  # of optimizer state, indices, and train_only's copies of the entries
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, test accuracy)


class Task:
    """What all methods share: the model to start from, and the batches in their order."""

    def __init__(self, data: Data, args: argparse.Namespace) -> None:
        self.data, self.args = data, args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        needed = max(args.steps * args.batch_size, SCORED)
        stream = shuffled(data.train, needed, args.seed)
        self.train = self.batches(stream, args.batch_size)
        self.test = self.batches(by_length(data.test), 32)
        # To measure the time of scoring: the same samples together, and some of them one by one.
        scored = by_length(stream[:SCORED])
        self.scored = self.batches(scored, args.batch_size)
        self.looped = self.batches(scored[:: -(-len(scored) // LOOPED)], 1)

    def new_model(self) -> nn.Module:
        """The pretrained model under a new head, which is the same each time."""
        torch.manual_seed(self.args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.args.model, num_labels=len(self.data.labels)
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(DEVICE)

    def batches(self, examples: list[Example], size: int) -> list[Batch]:
        """Each as long as its longest text, at most MAX_TOKENS."""
        return [self._batch(examples[i : i + size]) for i in range(0, len(examples), size)]

    def _batch(self, examples: list[Example]) -> Batch:
        labels, texts = zip(*examples, strict=True)
        columns = [list(column) for column in zip(*texts, strict=True)]
        batch = self.tokenizer(
            *columns, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([self.data.labels.index(label) for label in labels])
        return dict(batch.to(DEVICE))


def by_length(examples: list[Example]) -> list[Example]:
    """Neighbours of about the same length: batches of them hold little padding."""
    return sorted(examples, key=lambda example: len(" ".join(example[1])))


def fit(run: Run, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
    """An ordinary training loop: linear decay, and a look at the test set every now and then."""
    steps = task.args.steps
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    torch.manual_seed(task.args.seed)
    bar = tqdm(task.train[:steps], desc=run.what, unit="step")
    for step, batch in enumerate(bar):
        if step % max(steps // 5, 5) == 0:
            run.curve.append((step, accuracy(model, task.test)))
        model.train()
        start = now()
        loss = model(**batch).loss
        loss.backward()
        before_update = now()
        optimizer.step()
        end = now()
        optimizer.zero_grad()
        schedule.step()
        run.step_ms.append(end - start)
        run.optimizer_ms.append(end - before_update)
        bar.set_postfix(loss=f"{loss.item():.2f}")
    run.curve.append((steps, accuracy(model, task.test)))
    count_costs(run, model, optimizer)
    return run


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return torch.cat(hits).float().mean().item()


def head_of(model: nn.Module) -> str:
    """The glob of the new head's parameters."""
    return "*score.*" if hasattr(model, "score") else "*classifier.*"


def num_candidates(model: nn.Module) -> int:
    """How many weights are trainable, the head's not among them."""
    return sum(without_head(trainable_sizes(model), model).values())


def trainable_sizes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def without_head(sizes: dict[str, int], model: nn.Module) -> dict[str, int]:
    return {name: n for name, n in sizes.items() if not fnmatchcase(name, head_of(model))}


def count_costs(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Count what was trained, and the bytes of all that is held for it beside the model."""
    sizes = trainable_sizes(model)
    held = [tensor for state in optimizer.state.values() for tensor in state.values()]
    if isinstance(optimizer, fishkern.FishSparseAdamW):
        run.mask = optimizer.mask
        sizes = {name: len(indices) for name, indices in run.mask.items()}
        held += run.mask.values()
    if handle := fishkern.attached(model):
        held += handle.parameters()
    run.trained = sum(without_head(sizes, model).values())
    run.head = sum(sizes.values()) - run.trained
    run.bytes = sum(tensor.nbytes for tensor in held)


def time_scoring(run: Run, task: Task, model: nn.Module) -> None:
    """Milliseconds per sample: as fishkern scores, its self-check left out, and by the loop."""

    def score(batches: list[Batch]) -> None:
        fishkern.estimate_fisher(model, batches, verify=0, progress=False)

    score(task.scored[:1])  # builds the kernels, if this is their first use
    start = now()
    score(task.scored)
    middle = now()
    one_sample_loop(model, task.looped)
    run.scoring_ms = (middle - start) / sum(len(batch["labels"]) for batch in task.scored)
    run.loop_ms = (now() - middle) / len(task.looped)


def one_sample_loop(model: nn.Module, samples: list[Batch]) -> dict[nn.Parameter, Tensor]:
    """The Fisher information as it is usually computed: a backward pass for each sample."""
    model.eval()
    scores = {p: torch.zeros_like(p) for p in model.parameters() if p.requires_grad}
    for sample in samples:
        model(**sample).loss.backward()
        for param, score in scores.items():
            score += param.grad**2 / len(samples)
            param.grad = None
    return scores


def now() -> float:
    """Milliseconds."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()
