"""Lightning: a module whose configure_optimizers returns ours, or any on leaves; resumed."""

import pytest
import torch
from torch.utils.data import DataLoader

import fishkern
from fishkern import FishSparseAdamW
from tests.support.loops import (
    BATCH,
    DECAY,
    LR,
    STEPS,
    assert_same_weights,
    dataset,
    make_model,
    mask_of,
    weights,
)

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*GPU available"),
]
EPOCHS = 2


def without_dropout(model):
    """Lightning's checkpoints hold no random states."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class Tuner(lightning.LightningModule):
    def __init__(self, kind, leaves=False, stock=False):
        super().__init__()
        self.model = without_dropout(make_model(kind))
        self.mask, self.stock = mask_of(self.model), stock
        if leaves:
            fishkern.train_only(self.model, self.mask)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        if self.stock:
            leaves = fishkern.attached(self.model).parameters()
            optimizer = torch.optim.AdamW(leaves, lr=LR, weight_decay=DECAY)
        else:
            optimizer = FishSparseAdamW(self.model.named_parameters(), lr=LR, mask=self.mask)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


WAYS = {"dense": {}, "leaves": {"leaves": True}, "adamw": {"leaves": True, "stock": True}}


def fit(module, folder, epochs=EPOCHS, resume=None, **options):
    """Train for some epochs; returns the weights."""
    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    count = STEPS // EPOCHS * options["accumulate_grad_batches"] * BATCH
    trainer.fit(module, DataLoader(dataset(count), BATCH), ckpt_path=resume, weights_only=False)
    assert trainer.global_step == epochs * STEPS // EPOCHS
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return weights(module.model)


def check_resumed(kind, way, folder, **options):
    before = weights(make_model(kind))
    unbroken = fit(Tuner(kind, **WAYS[way]), folder, **options)
    assert any(not torch.equal(unbroken[name], before[name]) for name in before)
    fit(Tuner(kind, **WAYS[way]), folder, epochs=1, **options)
    resumed = fit(Tuner(kind, **WAYS[way]), folder, resume=folder / "1.ckpt", **options)
    assert_same_weights(resumed, unbroken)


@pytest.mark.parametrize("kind", ["lora", "base"])
@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_unbroken(way, kind, tmp_path):
    check_resumed(kind, way, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_unbroken_under_autocast(way, tmp_path):
    check_resumed("base", way, tmp_path, precision="bf16-mixed")


@pytest.mark.parametrize("way", ["dense", "leaves"])
def test_resumed_is_unbroken_in_bfloat16(way, tmp_path):
    check_resumed("bf16", way, tmp_path, precision="bf16-true")


@pytest.mark.parametrize("way", WAYS)
def test_fit_is_the_plain_loop(way, tmp_path):
    fitted = fit(Tuner("base", **WAYS[way]), tmp_path)
    module = Tuner("base", **WAYS[way])
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batches = list(DataLoader(dataset(STEPS // EPOCHS * 2 * BATCH), BATCH)) * EPOCHS
    for i, batch in enumerate(batches):
        (module.training_step(batch, i) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_same_weights(fitted, weights(module.model))
