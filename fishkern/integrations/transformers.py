"""transformers' Trainer: score with its own data, select, and train the selected entries.

``Trainer`` itself needs nothing from here: pass it ``optimizers=(FishSparseAdamW(...), None)``, or
``optimizer_cls_and_kwargs=(FishSparseAdamW, {"mask": mask.bind(model), ...})``, or a model that
``train_only`` is attached to. ``FishTrainer`` also makes the mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from fishkern.batches.losses import LossFn
from fishkern.batches.packing import SAMPLE_IDS
from fishkern.optim import FishSparseAdamW
from fishkern.recipe import Values, choose_mask, create_fish_optimizer
from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.scoring.preserve import random_state
from fishkern.selection.masks import SparseMask
from fishkern.training.train_only import train_only as attach

__all__ = ["MASK_NAME", "FishTrainer", "fish_optimizer_factory"]

MASK_NAME = "fishkern_mask.safetensors"  # in each checkpoint, beside the weights


def fish_optimizer_factory() -> Callable[..., FishSparseAdamW]:
    """``create_fish_optimizer`` in the form that ``Trainer`` calls: ``factory()(model, **kwargs)``.

    For a plain ``Trainer`` (transformers releases that know optimizer factories) whose scoring
    data are other than its training data. All of ``create_fish_optimizer``'s arguments stand in
    the kwargs: of the TrainingArguments only the schedule and the clipping take part. A resumed run
    scores again and then goes on with its checkpoint's mask.

    Example:
        >>> import torch
        >>> factory, kwargs = fish_optimizer_factory, {"density": 0.5, "lr": 1e-3, "loss_fn": (
        ...     lambda model, batch: model(batch).square().sum(1)),
        ...     "batches": [torch.randn(8, 3)], "num_samples": 8, "progress": False}
        >>> optimizer_cls_and_kwargs = (factory, kwargs)  # for Trainer, which then calls
        >>> factory()(torch.nn.Linear(3, 2), **kwargs).mask.num_selected
        4
    """
    return create_fish_optimizer


class FishTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that trains only the entries that matter, chosen by its own training data.

    In the place of ``Trainer``, with ``density`` beside its arguments; in front of a subclass of
    ``Trainer`` it is a mixin: ``class FishSFTTrainer(FishTrainer, SFTTrainer): pass``.

    When training starts, the first samples of ``get_train_dataloader()`` are scored, with the
    random states put back, so that training sees its data as it would have. Sequences that a
    collator flattens into one row (``position_ids`` that begin anew, no attention mask) are samples
    each, unless there is a ``loss_fn``.

    Where the arguments ask for torch's AdamW, as by default, ``FishSparseAdamW`` takes its place,
    with the learning rate, betas, eps, decay and decay groups of the TrainingArguments. Any other
    optimizer (``optim`` or ``optimizer_cls_and_kwargs``) trains the leaves of ``train_only=True``.
    Options of FishSparseAdamW itself go in ``optimizer_cls_and_kwargs=(FishSparseAdamW, {...})``.

    ``save_model`` and every checkpoint write the mask beside the weights
    (``fishkern_mask.safetensors``); a resumed run takes it from there and scores nothing.

    Args:
        *args: As for ``Trainer``.
        density: Share of the trainable parameters (without ``keep``) to train.
        num_samples: How many samples to score with; None: all. Each process scores as many of its
            own; the mask is the first one's.
        warmup_steps: AdamW steps before scoring, undone afterwards: not the schedule's warm-up.
            None: 30 where a whole matrix is zero, as in a fresh adapter, or where something is
            kept; else 0.
        rewind: Put the initial weights back after scoring.
        scope: As for ``select``: "global", or the same share of each "tensor".
        keep: Globs of parameters to train whole, such as a new head: not ranked, not counted.
        train_only: Make the selected entries the model's only trainable parameters. Clipping then
            sees these alone; without, it sees every entry of the dense gradients.
        loss_fn: As for ``estimate_fisher``; None: the model class's loss.
        **kwargs: As for ``Trainer``.

    Raises:
        ValueError: A ready optimizer, or a mask for it, was passed; FSDP, DeepSpeed or (with
            ``train_only``) DataParallel is at work; when training starts, as from
            ``create_fish_optimizer``, or if the checkpoint has no mask, the optimizer needs
            ``train_only``, or the dataset can be iterated only once.

    Example:
        >>> import tempfile, torch
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
        ...                     num_attention_heads=2, intermediate_size=8)
        >>> data = [{"input_ids": torch.randint(9, (5,)), "labels": i % 2} for i in range(32)]
        >>> trainer = FishTrainer(
        ...     BertForSequenceClassification(config),
        ...     TrainingArguments(tempfile.mkdtemp(), use_cpu=True, disable_tqdm=True),
        ...     train_dataset=data, density=0.05, keep="classifier*", num_samples=16)
        >>> optimizer = trainer.create_optimizer()  # as trainer.train() does at its start
        >>> trainer.mask.dense("classifier.weight").all(), trainer.fisher.num_samples
        (tensor(True), 16)
    """

    optimizer_cls_and_kwargs: Any  # Trainer's

    def __init__(
        self,
        *args: Any,
        density: float,
        num_samples: int | None = 128,
        warmup_steps: int | None = None,
        rewind: bool = True,
        scope: str = "global",
        keep: str | Iterable[str] = (),
        train_only: bool = False,
        loss_fn: LossFn | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            raise ValueError(
                f"a ready {type(self.optimizer).__name__} was passed, but FishTrainer makes the "
                f"optimizer for its mask: leave optimizers out (or only pass its scheduler), or "
                f"use Trainer with a mask of your own"
            )
        if self.optimizer_cls_and_kwargs and "mask" in self.optimizer_cls_and_kwargs[1]:
            raise ValueError(
                "optimizer_cls_and_kwargs has a mask, but FishTrainer makes its own: leave that "
                "one out, or use Trainer with it"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"{name} is enabled, which shards the parameters that a mask speaks of: use DDP, "
                f"or one device"
            )
        if train_only and self.args.n_gpu > 1:
            raise ValueError(
                f"train_only=True on {self.args.n_gpu} GPUs in one process, where Trainer uses "
                f"DataParallel, whose copies of the model have no leaves: launch a process for "
                f"each GPU (torchrun), or show this one a single GPU"
            )
        self._choice: dict[str, Any] = {
            "density": density,
            "num_samples": num_samples,
            "warmup_steps": warmup_steps,
            "rewind": rewind,
            "scope": scope,
            "keep": keep,
            "loss_fn": loss_fn,
        }
        self._train_only = train_only
        self._checkpoints_mask: SparseMask | None = None
        self.mask: SparseMask | None = None
        self.fisher: FisherDiagonal | None = None  # stays None in a resumed run

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a checkpoint's mask is the one to go on with."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._checkpoints_mask = _load_mask(checkpoint) if checkpoint else None
        if self._checkpoints_mask not in (None, self.mask) and self.mask is not None:
            raise ValueError(
                f"this trainer has trained {self.mask!r}, and {str(checkpoint)!r} another mask, "
                f"{self._checkpoints_mask!r}: resume it with a new trainer and a new model"
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.create_optimizer``, for the selected entries."""
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        given = self.optimizer_cls_and_kwargs
        optimizer_cls, options = self._optimizer_for(self.model)
        mask, warmed, handle = self._checkpoints_mask, Values(), None
        if mask is None:
            mask, warmed = self._chosen_mask(self.model)
        before = warmed.put()
        try:
            if self._train_only:
                handle = attach(self.model, mask)
            if _knows_masks(optimizer_cls):
                options = {**options, "mask": mask.bind(self.model)}
            self.optimizer_cls_and_kwargs = (optimizer_cls, options)
            optimizer = super().create_optimizer(*args, **kwargs)  # which makes the decay groups
        except BaseException:
            if handle is not None:
                handle.remove()
            before.put()
            raise
        finally:
            self.optimizer_cls_and_kwargs = given
        self.mask = mask
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``, with the mask beside the weights."""
        super().save_model(output_dir, _internal_call)
        if self.mask is not None and self.args.should_save:
            self.mask.save(os.path.join(output_dir or self.args.output_dir, MASK_NAME))

    def _optimizer_for(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class and options; FishSparseAdamW in the place of torch's AdamW."""
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_cls, options = self.optimizer_cls_and_kwargs
        else:
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if optimizer_cls is torch.optim.AdamW:
                optimizer_cls = FishSparseAdamW
        if not _knows_masks(optimizer_cls) and not self._train_only:
            raise ValueError(
                f"{getattr(optimizer_cls, '__name__', optimizer_cls)} knows no mask: pass "
                f"train_only=True, which leaves it nothing but the selected entries, or choose "
                f"optim='adamw_torch', in whose place FishSparseAdamW is used"
            )
        return optimizer_cls, options

    def _chosen_mask(self, model: nn.Module) -> tuple[SparseMask, Values]:
        """The mask by this trainer's data, the same on every rank; and values to be put then."""
        dataset: Any = self.train_dataset
        if isinstance(dataset, IterableDataset) and iter(dataset) is iter(dataset):
            raise ValueError(
                f"the {type(dataset).__name__} gives one iterator only, so what is scored would be "
                f"lost to training: pass a dataset that can be iterated again, or score with "
                f"other data and use Trainer"
            )
        with random_state(), self.accelerator.autocast():
            batches = _Batches(self.get_train_dataloader(), self.args.device)
            choice = choose_mask(
                model,
                batches if self._choice["loss_fn"] else _Unpacked(batches, model),
                progress=not self.args.disable_tqdm,
                **self._choice,
            )
        self.fisher = choice.fisher
        masks = [choice.mask.to("cpu")]
        broadcast_object_list(masks)  # ranks score different samples
        return masks[0], choice.warmed


class _Batches:
    """A prepared loader's batches on a device, without what Accelerate notes when it is iterated.

    Its loaders synchronise random states, and make themselves the one that accumulation and
    ``gather_for_metrics`` ask for the last batch, until they have been iterated to their end.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader = getattr(loader, "base_dataloader", loader)
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield send_to_device(batch, self._device)


#: What flash attention is told of all sequences of a batch; it finds them in the positions, too.
_OF_A_ROW = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class _Unpacked:
    """Batches in which flattened sequences, whose positions begin anew, are told apart.

    As collators flatten them for training: several sequences in one row, and no attention mask.
    """

    def __init__(self, batches: Iterable[Any], model: nn.Module) -> None:
        self._batches = batches
        cached = getattr(getattr(model, "config", None), "use_cache", False)
        # With a cache models of transformers keep the sequences of a row no longer apart.
        self._options = {"use_cache": False} if cached else {}

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            flattened = isinstance(batch, Mapping) and "attention_mask" not in batch
            positions = batch.get("position_ids") if flattened else None
            if not isinstance(positions, Tensor) or positions.dim() != 2:
                yield batch
                continue
            begins = torch.ones_like(positions)
            begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
            numbers = begins.flatten().cumsum(0).view_as(positions) - 1
            parts = {key: value for key, value in batch.items() if key not in _OF_A_ROW}
            yield {**parts, **self._options, SAMPLE_IDS: numbers}


def _knows_masks(optimizer_cls: Any) -> bool:
    return isinstance(optimizer_cls, type) and issubclass(optimizer_cls, FishSparseAdamW)


def _load_mask(checkpoint: str) -> SparseMask:
    path = os.path.join(checkpoint, MASK_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{str(checkpoint)!r} has no {MASK_NAME}: it was not written by a FishTrainer; resume "
            f"it with the trainer that wrote it"
        )
    return SparseMask.load(path)
