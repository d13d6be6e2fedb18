"""Fine-tuning as it is measured: a model, a batch, a mask; and what a training step takes.

All that is trained beside the way's own weights is the same new head, by every way.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fishkern
from benchmarks.harness import WARMUPS, Config, Missing, require, synchronize
from benchmarks.memory import (
    allocated_peak,
    cuda_peak,
    kept_tensors,
    storages,
    tensors_in,
    tensors_of,
)
from benchmarks.workloads import glue
from benchmarks.workloads.encoder import Batch, encoder
from benchmarks.workloads.masks import mask_of
from benchmarks.workloads.shaped_scores import shaped_scores

# Shapes without their weights. As many layers as MiniLM has, since a mask shaped like its own has
# most entries in the last one; and a small vocabulary, which is not trained.
BERT_BASE = {"vocab_size": 1000, "hidden_size": 768, "num_hidden_layers": 6}
BERT_BASE |= {"num_attention_heads": 12, "intermediate_size": 3072}
LLAMA = {"vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 6}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408}
LLAMA |= {"pad_token_id": 0}


@dataclass
class Finetuning:
    """What every way starts from: a copy of the model is its own, the rest is shared."""

    model: Any
    batch: Batch
    scores: dict[str, Tensor]  # of the layers' parameters
    mask: fishkern.SparseMask
    head: list[str]
    trainers: dict[str, Trainer] = field(default_factory=dict)  # by the way's name

    @property
    def layers(self) -> list[str]:
        """What may be trained beside the head."""
        return list(self.mask)

    def trainer(self) -> Trainer:
        """The model's copy in training mode with its head trainable, and no optimizer yet."""
        model = copy.deepcopy(self.model).train()
        glue.require_grad_only(model, self.head)
        base = dict(model.named_parameters())
        return Trainer(model, self.batch, base, self.head, set(storages(tensors_of(model))))


class Phases(NamedTuple):
    """Seconds of one training step."""

    forward: float
    backward: float
    step: float


class Footprint(NamedTuple):
    """Bytes of one training step."""

    kept: int  # from forward to backward: each storage once and whole, what is there anyway not
    gradients: int  # at the end of the backward pass
    held: int  # between steps, beside the model: state, indices, leaves, adapters
    peak: int  # in a step, beyond what is held between steps


@dataclass
class Trainer:
    """A model, its optimizer and one batch: each call is a training step."""

    model: Any
    batch: Batch
    base: dict[str, nn.Parameter]  # the model's own, by the names that they had at first
    head: list[str]
    places: set[int]  # of the storages that there were before anything was added
    optimizer: Any = None
    mask: fishkern.SparseMask | None = None  # where not all that requires a gradient is trained
    phases: list[Phases] = field(default_factory=list)

    def __call__(self) -> None:
        start = self._now()
        loss = self.model(**self.batch).loss
        middle = self._now()
        loss.backward()
        after = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.phases.append(Phases(middle - start, after - middle, self._now() - after))

    def medians(self) -> Phases:
        """Of the steps after the first ones, which the harness does not count either."""
        return Phases(*map(statistics.median, zip(*self.phases[WARMUPS:], strict=True)))

    @property
    def trained(self) -> int:
        """How many numbers the optimizer trains, without the head's."""
        if self.mask is not None:
            return self.mask.num_selected
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return sum(p.numel() for p in trainable) - self.head_size

    @property
    def head_size(self) -> int:
        return sum(self.base[name].numel() for name in self.head)

    def footprint(self) -> Footprint:
        """Measured in three more steps."""
        self()  # so that state is there
        persistent = storages(self._persistent())
        loss = self.model(**self.batch).loss
        found = storages(kept_tensors(loss))
        kept = sum(size for place, size in found.items() if place not in persistent)
        loss.backward()
        gradients = sum(storages(p.grad for p in self.model.parameters()).values())
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        added = storages(self._persistent()).items()
        held = sum(size for place, size in added if place not in self.places)
        on_gpu = self._device == "cuda"
        peak = round(2**20 * cuda_peak(self)) if on_gpu else allocated_peak(self)
        return Footprint(kept, gradients, held, peak)

    def _persistent(self) -> list[Tensor]:
        """All that is there between steps, in the modules and in the optimizer."""
        return [*tensors_of(self.model), *tensors_in(vars(self.optimizer), set())]

    @property
    def _device(self) -> str:
        return self.batch["labels"].device.type

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def finetuning(config: Config, device: str) -> Finetuning:
    """``config``: model, density, batch, tokens; dropout, where it is not to be the model's.

    It is told which weights and scores there were, and how the mask came out: its number of
    entries, and the shares of columns, rows and tiles that hold one.
    """
    torch.manual_seed(0)
    model: Any = base_model(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.get("dropout", module.p)
    candidates = glue.layer_parameters(model)
    config["scores"] = "shaped_like_minilm_on_sst2"
    if config["model"] == "minilm":
        try:
            scores = glue.scores("sst2")
            config["scores"] = "sst2"
        except Missing as reason:
            config["why"] = re.sub(r"\W+", "_", str(reason).split(":")[0])
    if config["scores"] != "sst2":
        params = dict(model.named_parameters())
        shapes = {name: params[name].shape for name in candidates}
        scores = shaped_scores(shapes, model.config.hidden_size)
    mask, shares = mask_of(scores, config["density"])
    config["selected"] = mask.num_selected
    config |= {name: round(share, 4) for name, share in shares._asdict().items()}
    size = (config["batch"], config["tokens"])
    ids = torch.randint(1, model.config.vocab_size, size, device=device)
    batch = {"input_ids": ids, "labels": torch.randint(2, size[:1], device=device)}
    head = [name for name, _ in model.named_parameters() if re.match("classifier|score", name)]
    return Finetuning(model.to(device), batch, scores, mask.to(device), head)


def base_model(config: Config) -> nn.Module:
    """The model under a classifier of two classes; ``config`` is told its weights and layers."""
    if config["model"] in ("minilm", "tiny"):
        model: Any = encoder(config)
        config["layers"] = model.config.num_hidden_layers
        return model
    transformers = require("transformers", "transformers")
    config["weights"] = "random"
    if config["model"] == "bert-base-shaped":
        config["layers"] = f"{BERT_BASE['num_hidden_layers']}_of_12"
        shape = transformers.BertConfig(**BERT_BASE, num_labels=2)
        model = transformers.BertForSequenceClassification(shape)
    else:
        config["layers"] = f"{LLAMA['num_hidden_layers']}_of_width_{LLAMA['hidden_size']}"
        shape = transformers.LlamaConfig(**LLAMA, num_labels=2)
        model = transformers.LlamaForSequenceClassification(shape)
    return model
