"""TRL's SFTTrainer, with FishTrainer in front of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fishkern
from fishkern import FishSparseAdamW
from fishkern.integrations.transformers import FishTrainer
from tests.support.loops import assert_same_weights, weights
from tests.support.problems import VOCAB, llama

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class FishSFTTrainer(FishTrainer, trl.SFTTrainer):
    pass


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def train(folder, resume=None, **options):
    torch.manual_seed(0)
    texts = [" ".join(f"w{2 + (i * j) % 40}" for j in range(3 + i % 5)) for i in range(24)]
    args = trl.SFTConfig(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        dataloader_pin_memory=False,
    )
    subject = FishSFTTrainer(
        llama(),
        args,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        density=0.2,
        num_samples=16,
        warmup_steps=2,
        **options,
    )
    subject.train(resume_from_checkpoint=resume)
    return subject, weights(subject.model)


@pytest.mark.parametrize("train_only", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_sft_trainer_resumed_is_unbroken(peft, train_only, tmp_path):
    options = {"train_only": train_only}
    if peft:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    subject, unbroken = train(tmp_path, **options)
    assert type(subject.optimizer.optimizer) is FishSparseAdamW
    resumed, ended = train(tmp_path, resume=tmp_path / "checkpoint-2", **options)
    assert resumed.fisher is None
    assert resumed.mask == subject.mask
    assert_same_weights(unbroken, ended)


def test_dpo_trainer_is_attached_to_once_it_is_made(tmp_path):
    """It copies the adapter in its constructor; what is attached then trains the entries alone."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    pairs = [{"prompt": "w2 w3", "chosen": "w4 w5", "rejected": f"w{6 + i}"} for i in range(8)]
    args = trl.DPOConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = trl.DPOTrainer(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    scores = {name: torch.rand(trainer.model.get_parameter(name).shape) for name in trained}
    mask = fishkern.select(scores, density=0.3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    fishkern.train_only(trainer.model, mask)
    trainer.train()
    for name, value in before.items():
        changed = (trainer.model.get_parameter(name) != value).flatten().nonzero().flatten()
        assert changed.tolist() == (mask[name].tolist() if name in mask else []), name
