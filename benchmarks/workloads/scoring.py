"""What is scored: a model with its candidates, batches for it, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Config, require
from benchmarks.workloads.encoder import Batch, encoder

# Ways to adapt a model: a package, the name of its configuration, and what that is given.
# LoRA's B is drawn, too: at B = 0 half of all gradients would be zero.
LORA = {"r": 8, "target_modules": ["query", "value"], "init_lora_weights": False}
IA3 = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("peft", "LoraConfig", LORA),
    "dora": ("peft", "LoraConfig", {**LORA, "use_dora": True}),
    "ia3": ("peft", "IA3Config", IA3),
    "houlsby": ("adapters", "DoubleSeqBnConfig", {}),
    "pfeiffer": ("adapters", "SeqBnConfig", {}),
    "parallel": ("adapters", "ParBnConfig", {}),
}


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
        model = adapted(model, *ADAPTERS[config["params"]])
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


def adapted(model: Any, package: str, kind: str, options: dict[str, Any]) -> nn.Module:
    """The model with an adapter, which alone requires gradients."""
    module = require(package, package)
    config = getattr(module, kind)(**options)
    if package == "peft":
        return module.get_peft_model(model, config)  # type: ignore[no-any-return]
    module.init(model)
    model.add_adapter("fish", config=config)
    model.train_adapter("fish")
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad and ".fish." in name)
    return model  # type: ignore[no-any-return]


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
