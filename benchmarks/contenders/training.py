"""The ways of fine-tuning that are compared: from what they share, each makes a ``Trainer``."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

import fishkern
from benchmarks.harness import Missing, require
from benchmarks.workloads.finetuning import Finetuning, Trainer
from benchmarks.workloads.glue import require_grad_only

FISHKERN, FISHKERN_DENSE = "fishkern", "fishkern, dense gradients"
FISHKERN_COLUMNS = "fishkern, max_columns=0.1"
FUSED, FLOOR = "AdamW(fused)", "input gradients alone"
LORA_EQUAL, LORA_8, LORA_ALL = "LoRA, as many weights", "LoRA r=8", "LoRA r=8, all linears"
LORA_FA, SHIRA, SUPERTUNING, BADAM = "LoRA-FA r=8", "SHiRA", "Super-Tuning", "BAdam"

RATE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 1e-2}
QUERY_AND_VALUE = ["query", "value", "q_proj", "v_proj"]
ALL_LINEARS = r".*\.layers?\.\d+\..*(query|key|value|dense|_proj)"
RANK = 8


def selected_entries(work: Finetuning) -> Trainer:
    """The mask's entries as the only trainable parameters."""
    return _train_only(work, work.mask)


def entries_of_few_columns(work: Finetuning) -> Trainer:
    """As many entries, from the best tenth of each matrix's columns."""
    mask = fishkern.select(work.scores, k=work.mask.num_selected, max_columns=0.1)
    return _train_only(work, mask.to(work.batch["labels"].device))


def selected_entries_of_dense(work: Finetuning) -> Trainer:
    """The mask's entries, from dense gradients."""
    trainer = work.trainer()
    require_grad_only(trainer.model, work.layers + work.head)
    return _with_fish_optimizer(trainer, work.mask)


def every_weight(work: Finetuning) -> Trainer:
    """All of the layers' parameters, with torch's AdamW."""
    trainer = work.trainer()
    require_grad_only(trainer.model, work.layers + work.head)
    return _with_adamw(trainer)


def nothing_but_input_gradients(work: Finetuning) -> Trainer:
    """What ways that train something in each layer have in common.

    The forward pass, and the gradients of activations down to the first layer's projections.
    """
    trainer = work.trainer()
    for name, module in trainer.model.named_modules():
        if re.search(r"\.layers?\.0\..*(query|key|value|[qkv]_proj)$", name):
            module.register_forward_hook(lambda _module, _x, out: out.requires_grad_())
    return _with_adamw(trainer)


def lora(work: Finetuning, rank: int = RANK, targets: Any = QUERY_AND_VALUE) -> Trainer:
    """PEFT's LoRA with torch's AdamW."""
    peft = require("peft", "peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    return _with_adamw(_adapted(work, config))


def lora_of_as_many(work: Finetuning) -> Trainer:
    """LoRA of the rank that comes closest to as many weights as the mask has."""
    return lora(work, rank=_equal_rank(work))


def lora_fa(work: Finetuning) -> Trainer:
    """PEFT's LoRA-FA: its A stays as it was drawn."""
    peft = require("peft", "peft")
    try:
        from peft.optimizers import create_lorafa_optimizer
    except ImportError as error:
        raise Missing(f"this PEFT has no LoRA-FA: {error}") from error
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=QUERY_AND_VALUE)
    trainer = _adapted(work, config)
    trainer.optimizer = create_lorafa_optimizer(
        trainer.model, r=RANK, lora_alpha=2 * RANK, lr=RATE["lr"]
    )
    return trainer


def shira(work: Finetuning) -> Trainer:
    """PEFT's SHiRA on query and value: entries drawn at random, as many as the mask's."""
    config = _config("ShiraConfig")
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch warns of it
    rank = _equal_rank(work)
    return _with_adamw(
        _adapted(work, config(r=rank, target_modules=QUERY_AND_VALUE, random_seed=0))
    )


def supertuning(work: Finetuning) -> Trainer:
    """PEFT's Super-Tuning on query and value: the largest entries, as many as the mask's."""
    config = _config("SupertuningConfig")
    entries = sum(
        param.numel()
        for name, param in work.model.named_parameters()
        if name.endswith(tuple(f"{target}.weight" for target in QUERY_AND_VALUE))
    )
    share = min(1.0, work.mask.num_selected / entries)
    return _with_adamw(_adapted(work, config(sparsity=1 - share, target_modules=QUERY_AND_VALUE)))


def badam(work: Finetuning) -> Trainer:
    """BAdam: one layer at a time; here the middle one, whose cost is about the mean."""
    package = require("badam", "badam")
    trainer = work.trainer()
    found = [re.match(r".*\.layers?\.\d+\.", name) for name in work.layers]
    blocks = list(dict.fromkeys(match[0] for match in found if match))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # it would have half precision
        trainer.optimizer = package.BlockOptimizer(
            torch.optim.AdamW(trainer.model.parameters(), fused=True, **RATE),
            list(trainer.model.named_parameters()),
            block_prefix_list=[[block] for block in blocks],
            start_block=len(blocks) // 2,
            switch_mode="fixed",
            active_modules=work.head,
            verbose=0,
        )
    return trainer


WAYS: dict[str, Callable[[Finetuning], Trainer]] = {
    FISHKERN: selected_entries,
    FISHKERN_COLUMNS: entries_of_few_columns,
    FISHKERN_DENSE: selected_entries_of_dense,
    FUSED: every_weight,
    LORA_EQUAL: lora_of_as_many,
    LORA_8: lora,
    LORA_ALL: lambda work: lora(work, targets=ALL_LINEARS),
    LORA_FA: lora_fa,
    SHIRA: shira,
    SUPERTUNING: supertuning,
    BADAM: badam,
    FLOOR: nothing_but_input_gradients,
}


def _train_only(work: Finetuning, mask: fishkern.SparseMask) -> Trainer:
    trainer = work.trainer()
    fishkern.train_only(trainer.model, mask, unlisted="train")
    return _with_fish_optimizer(trainer, mask)


def _with_fish_optimizer(trainer: Trainer, mask: fishkern.SparseMask) -> Trainer:
    trainer.mask = mask
    trainer.optimizer = fishkern.FishSparseAdamW(
        trainer.model.named_parameters(), mask=mask, unlisted="train", **RATE
    )
    return trainer


def _with_adamw(trainer: Trainer) -> Trainer:
    params = [param for param in trainer.model.parameters() if param.requires_grad]
    trainer.optimizer = torch.optim.AdamW(params, fused=True, **RATE)
    return trainer


def _adapted(work: Finetuning, config: Any) -> Trainer:
    """The model under an adapter, its head trainable as it is."""
    trainer = work.trainer()
    head = [trainer.base[name] for name in work.head]
    trainer.model = require("peft", "peft").get_peft_model(trainer.model, config)
    for param in head:
        param.requires_grad_(True)
    return trainer


def _config(name: str) -> Any:
    peft = require("peft", "peft")
    if not hasattr(peft, name):
        raise Missing(f"PEFT {peft.__version__} has no {name}: pip install -U peft")
    return getattr(peft, name)


def _equal_rank(work: Finetuning) -> int:
    """The rank at which LoRA on query and value has about as many weights as the mask."""
    per_rank = sum(
        sum(param.shape)
        for name, param in work.model.named_parameters()
        if name.endswith(tuple(f"{target}.weight" for target in QUERY_AND_VALUE))
    )
    return max(1, round(work.mask.num_selected / per_rank))
