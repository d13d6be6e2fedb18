"""For tests of frameworks' loops: models, data and masks, and two ways of training."""

import torch
from transformers import TrainingArguments

import fishkern
from tests.support.problems import bert, classes, lora, quiet

STEPS, BATCH, SAMPLES = 6, 4, 32
LR, DECAY = 1e-2, 0.1
HEAD = "*classifier*"


def lora_model():
    """A LoRA on a small BERT; PEFT keeps it in float32."""
    return lora(bert(), ["query", "value"], modules_to_save=["classifier"])


def base_model():
    """A small BERT, all of whose weights can be trained."""
    return quiet(bert)()


def bf16_model():
    """The same in bfloat16."""
    return base_model().to(torch.bfloat16)


MODELS = {"lora": lora_model, "base": base_model, "bf16": bf16_model}


def make_model(kind):
    """The same weights in each call, with dropout at work in training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[kind]().train()


def dataset(count=SAMPLES):
    """Samples as Trainer takes them: dicts of tensors without the batch's dimension."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        batch = classes(count)
    return [{key: value[n] for key, value in batch.items()} for n in range(count)]


def mask_of(model, density=0.1):
    """Which entries are selected is none of the loop's business: at random, and the whole head."""
    candidates = {n: torch.ones(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    return fishkern.select(candidates, density=density, keep=HEAD, order="random", seed=3)


def weights(model):
    """Copies of all that training may change."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(state, other):
    """Bit for bit."""
    assert state.keys() == other.keys()
    differing = [name for name in state if not torch.equal(state[name], other[name])]
    assert differing == []


def arguments(folder, **options):
    options = {"max_steps": STEPS, "save_strategy": "no", **options}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        weight_decay=DECAY,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def trained(make, kind, args, resume=None):
    """The trainer after training, and the weights."""
    subject = make(make_model(kind), args)
    subject.train(resume_from_checkpoint=resume)
    return subject, weights(subject.model)


def check_resumed(make, kind, tmp_path, **options):
    """A run that is stopped in its middle and resumed ends as the unbroken one."""
    middle = {"save_strategy": "steps", "save_steps": STEPS // 2}
    args = arguments(tmp_path, **middle, **options)
    subject, unbroken = trained(make, kind, args)
    assert any(not torch.equal(unbroken[n], v) for n, v in make_model(kind).state_dict().items())
    resumed, ended = trained(make, kind, args, tmp_path / f"checkpoint-{STEPS // 2}")
    assert resumed.state.global_step == STEPS
    assert_same_weights(unbroken, ended)
    return subject, resumed
