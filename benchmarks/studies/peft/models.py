"""A method of PEFT on a small model of a real class, with a batch, and its loss written out.

Models come in two sizes: "tiny", to be compared with float64; "large", to be timed.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Missing, require
from benchmarks.workloads.encoder import encoder

Batch = dict[str, Any]
Options = Mapping[str, Any]
NOISE = 0.05  # added to adapters: many start at zero, where half of all gradients are zero


@dataclass(frozen=True)
class Base:
    """``model(size)``, ``batch(model, samples, tokens)``, ``losses(model, batch)`` [N]."""

    model: Callable[[str], nn.Module]
    batch: Callable[[nn.Module, int, int], Batch]
    losses: Callable[[nn.Module, Batch], Tensor]
    targets: tuple[str, ...]  # the layers that adapters are put on


def _encoder(size: str) -> nn.Module:
    """BERT; the large one is MiniLM with its real weights, where they are installed."""
    if size == "large":
        return encoder({"model": "minilm"})
    widths = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_labels": 2}
    depths = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return _made("BertForSequenceClassification", **widths, **depths)


def _decoder(size: str) -> nn.Module:
    scale = 16 if size == "large" else 1
    widths = {"hidden_size": 16 * scale, "intermediate_size": 32 * scale, "vocab_size": 50 * scale}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return _made("LlamaForCausalLM", **widths, **heads, use_cache=False)


def _gpt2(size: str) -> nn.Module:
    scale = 16 if size == "large" else 1
    widths = {"n_embd": 16 * scale, "vocab_size": 50 * scale, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return _made("GPT2LMHeadModel", **widths, **ends, n_layer=2, n_head=2)


def _encoder_decoder(size: str) -> nn.Module:
    scale = 16 if size == "large" else 1
    widths = {"d_model": 16 * scale, "d_kv": 8 * scale, "d_ff": 32 * scale, "num_heads": 2}
    other = {"vocab_size": 50 * scale, "num_layers": 2, "decoder_start_token_id": 0}
    return _made("T5ForConditionalGeneration", **widths, **other)


def _images(size: str) -> nn.Module:
    scale = 4 if size == "large" else 1
    widths = {"embedding_size": 8 * scale, "hidden_sizes": [8 * scale, 16 * scale]}
    layers = {"depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    return _made("ResNetForImageClassification", **widths, **layers)


def _made(name: str, **config: Any) -> nn.Module:
    transformers = require("transformers", "transformers")
    cls = getattr(transformers, name)
    model: nn.Module = cls(cls.config_class(**config))
    return model


def _text(model: Any, samples: int, tokens: int) -> Batch:
    """Ids with padding on the right: none in the first sample, up to two in the others."""
    pads = torch.arange(samples).remainder(3).unsqueeze(1)
    return {
        "input_ids": torch.randint(2, model.config.vocab_size, (samples, tokens)),
        "attention_mask": (torch.arange(tokens) < tokens - pads).long(),
    }


def _labelled_text(model: nn.Module, samples: int, tokens: int) -> Batch:
    return {**_text(model, samples, tokens), "labels": torch.randint(2, (samples,))}


def _running_text(model: nn.Module, samples: int, tokens: int) -> Batch:
    text = _text(model, samples, tokens)
    return {**text, "labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)}


def _pictures(model: nn.Module, samples: int, tokens: int) -> Batch:
    """``tokens`` counts the rows and columns of pixels by fours."""
    pixels = torch.randn(samples, 3, 4 * tokens, 4 * tokens)
    return {"pixel_values": pixels, "labels": torch.randint(2, (samples,))}


def _class_losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(_logits(model, batch), batch["labels"], reduction="none")


def _next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels = _logits(model, batch), batch["labels"]
    virtual = logits.shape[1] - labels.shape[1]  # tokens that the adapter puts in front
    return _token_losses(logits[:, :-1], F.pad(labels, (virtual, 0), value=-100)[:, 1:])


def _sequence_losses(model: nn.Module, batch: Batch) -> Tensor:
    return _token_losses(model(**batch).logits, batch["labels"])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


BASES = {
    "encoder": Base(_encoder, _labelled_text, _class_losses, ("query", "value")),
    "decoder": Base(_decoder, _running_text, _next_token_losses, ("q_proj", "v_proj")),
    "gpt2": Base(_gpt2, _running_text, _next_token_losses, ("c_attn",)),
    "encoder-decoder": Base(_encoder_decoder, _running_text, _sequence_losses, ("q", "v")),
    "images": Base(_images, _pictures, _class_losses, ("convolution",)),
}


@dataclass(frozen=True)
class Method:
    """A row: ``package.config(**options)`` on a base model.

    ``routes``: route -> kinds of parameters that go this way, as patterns. ``refused``: what the
    error says where there is nothing exact to give, and ``why``. ``tasks``: batches say each
    sample's task. ``default_loss``: off where PEFT trains on another one, so that a ``loss_fn``
    must be passed. ``passes``: an argument that PEFT hands to the base model, which not every
    release of transformers still calls by PEFT's name.
    """

    name: str
    config: str
    routes: Mapping[str, str]
    options: Options | Callable[[Any, Path], Options] = field(default_factory=dict)
    base: str = "encoder"
    package: str = "peft"
    after: Callable[[nn.Module, Batch], None] | None = None  # an initialisation that takes data
    tasks: bool = False
    refused: str = ""
    why: str = ""
    default_loss: bool = True
    passes: str = ""

    def build(self, size: str = "tiny") -> nn.Module:
        """The adapted model, the same each time, its trained weights at no special point.

        Raises:
            Missing: The package that adapts, or one it needs, is not installed or does not fit.
        """
        package = imported(self.package)
        torch.manual_seed(0)
        base = BASES[self.base]
        model = base.model(size)
        if self.passes and self.passes not in signature(model.base_model.forward).parameters:
            name = type(model).__name__
            raise Missing(f"{self.package} passes {self.passes}, which {name} does not take")
        config = getattr(package, self.config)
        with tempfile.TemporaryDirectory() as folder:
            made = self.options
            options = dict(made(model, Path(folder)) if callable(made) else made)
            if self.package == "adapters":
                model = _with_adapter(package, model, config(**options))
            else:
                if "target_modules" in config.__dataclass_fields__:
                    options.setdefault("target_modules", list(base.targets))
                try:
                    model = package.get_peft_model(model, config(**options))
                except ImportError as error:  # what a single method needs beside it
                    raise Missing(str(error)) from error
        if self.after is not None:
            self.after(model, self.batch(model))
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param += NOISE * torch.randn_like(param)
        return model

    def batch(self, model: nn.Module, samples: int = 4, tokens: int = 6) -> Batch:
        """A padded batch, the same for the same arguments."""
        torch.manual_seed(samples)
        batch = BASES[self.base].batch(model, samples, tokens)
        return {**batch, "task_ids": torch.arange(samples) % 2} if self.tasks else batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each sample's own negative log-likelihood [N], written out."""
        return BASES[self.base].losses(model, batch)

    def loss_fn(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """What ``estimate_fisher`` is given; None where it finds the loss itself."""
        return None if self.default_loss else self.losses

    def patterns(self) -> Iterator[tuple[str, str]]:
        """Each pattern of ``routes``, with its route."""
        for route, kinds in self.routes.items():
            for pattern in kinds.split():
                yield pattern, route


def kind(name: str) -> str:
    """The kind of a parameter: its name without the layer, the adapter's name and "weight"."""
    parts = [p for p in name.split(".") if not p.isdigit() and p not in ("default", "weight")]
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter is of a kind that the pattern means."""
    return fnmatchcase(kind(name), pattern)


def widened(model: nn.Module) -> nn.Module:
    """A copy to be scored in float64. A few layers note the dtype that they were made in."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if vars(module).get("dtype") == torch.float32:
            module.dtype = torch.float64  # type: ignore[assignment]
    return model


def imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{package} is not installed: pip install {package}") from error


def _with_adapter(package: Any, model: Any, config: Any) -> nn.Module:
    package.init(model)
    model.add_adapter("default", config=config, set_active=True)
    model.train_adapter("default")
    adapted: nn.Module = model
    return adapted
