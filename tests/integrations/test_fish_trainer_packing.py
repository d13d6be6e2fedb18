"""FishTrainer scores flattened sequences one by one, though they come in one row."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import fishkern
from fishkern.integrations.transformers import FishTrainer
from tests.support.loops import arguments
from tests.support.problems import llama
from tests.support.tolerances import assert_scores_match

LENGTHS = (5, 7, 3, 6)


def sequences(count=16):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 30, (LENGTHS[n % 4],), generator=generator) for n in range(count)]
    return [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in drawn]


class Arguments(DataCollatorWithFlattening):
    """With what flash attention is told beside the positions."""

    def __init__(self):
        super().__init__(return_flash_attn_kwargs=True, return_seq_idx=True)


@pytest.mark.parametrize("collator", [DataCollatorWithFlattening, Arguments])
def test_each_sequence_is_a_sample(collator, tmp_path):
    torch.manual_seed(0)
    model = llama()
    alone = [{key: torch.tensor([value]) for key, value in one.items()} for one in sequences()]
    expected = fishkern.estimate_fisher(model, alone, progress=False)
    trainer = FishTrainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=sequences(),
        data_collator=collator(),
        density=0.1,
        num_samples=None,
    )
    trainer.train()
    assert trainer.fisher.num_samples == 16
    assert_scores_match(trainer.fisher, expected)


def test_a_loss_of_ones_own_gets_the_batch_as_it_is(tmp_path):
    seen = []

    def loss_fn(model, batch):
        seen.append(set(batch))
        return model(**batch).loss[None]

    trainer = FishTrainer(
        llama(),
        arguments(tmp_path),
        train_dataset=sequences(),
        data_collator=DataCollatorWithFlattening(),
        density=0.1,
        num_samples=2,
        loss_fn=loss_fn,
    )
    trainer.create_optimizer()
    assert seen[0] == {"input_ids", "labels", "position_ids"}
