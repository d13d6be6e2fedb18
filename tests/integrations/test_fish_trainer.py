"""FishTrainer scores with its own data, selects and trains, and changes nothing else."""

import shutil

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

import fishkern
from fishkern import FishSparseAdamW, SparseMask
from fishkern.integrations.transformers import MASK_NAME, FishTrainer
from tests.support.loops import (
    HEAD,
    LR,
    arguments,
    assert_same_weights,
    check_resumed,
    dataset,
    make_model,
    mask_of,
    trained,
    weights,
)
from tests.support.tolerances import assert_matches

# said by some releases of PEFT on saving, of a base model that came from no folder
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

OPTIONS = {"density": 0.1, "num_samples": 16, "keep": HEAD, "warmup_steps": 2}


def fish(model, args, **options):
    options = {**OPTIONS, "train_dataset": dataset(), **options}
    return FishTrainer(model, args, **options)


def fish_leaves(model, args, **options):
    return fish(model, args, train_only=True, **options)


def stock_on_leaves(model, args):
    given = (torch.optim.AdamW, {"lr": LR})
    return fish_leaves(model, args, optimizer_cls_and_kwargs=given)


@pytest.mark.parametrize("kind", ["lora", "base"])
@pytest.mark.parametrize("make", [fish, fish_leaves, stock_on_leaves])
def test_resumed_is_unbroken_and_scores_nothing(make, kind, tmp_path):
    subject, resumed = check_resumed(make, kind, tmp_path)
    assert subject.fisher.num_samples == 16
    assert resumed.fisher is None
    assert resumed.mask == subject.mask
    candidates = sum(p.numel() for p in make_model(kind).parameters() if p.requires_grad)
    assert 0.1 * candidates <= subject.mask.num_selected < 0.2 * candidates  # the head is in it


@pytest.mark.parametrize("make", [fish, fish_leaves])
@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.01}],
    ids=lambda options: next(iter(options)),
)
def test_resumed_is_unbroken_under(make, options, tmp_path):
    check_resumed(make, "base", tmp_path, **options)


@pytest.mark.parametrize("make", [fish, fish_leaves])
def test_resumed_is_unbroken_in_bfloat16(make, tmp_path):
    check_resumed(make, "bf16", tmp_path)


def test_resuming_the_last_checkpoint(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    _, unbroken = trained(fish, "base", args)
    shutil.rmtree(tmp_path / "checkpoint-4")
    subject, resumed = trained(fish, "base", args, resume=True)
    assert subject.state.global_step == 4
    assert_same_weights(unbroken, resumed)


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_data_and_dropout_are_those_of_a_plain_trainer(sampling, tmp_path):
    """Scoring leaves no trace: a plain Trainer with the same mask ends with the same bits."""
    args = arguments(tmp_path)
    if hasattr(args, "train_sampling_strategy"):
        args.train_sampling_strategy = sampling
    subject, ended = trained(fish, "base", args)

    def plain(model, args):
        options = {**subject.optimizer.optimizer.defaults, "mask": subject.mask.bind(model)}
        names = ("lr", "betas", "eps", "mask")
        options = {name: options[name] for name in names}
        given = (FishSparseAdamW, options)
        return Trainer(model, args, train_dataset=dataset(), optimizer_cls_and_kwargs=given)

    _, truth = trained(plain, "base", args)
    assert_same_weights(ended, truth)


def test_scores_are_those_of_its_first_batches(tmp_path):
    subject = fish(make_model("base"), arguments(tmp_path), warmup_steps=0)
    batches = iter(subject.get_train_dataloader())
    seen = [next(batches) for _ in range(4)]
    subject.create_optimizer()
    fisher = fishkern.estimate_fisher(make_model("base"), seen, num_samples=16, progress=False)
    for name, score in fisher.items():
        assert_matches(subject.fisher[name], score, terms=16)


@pytest.mark.filterwarnings("ignore:.*have a score of zero")  # all are selected
def test_full_density_has_the_loss_curve_of_adamw(tmp_path):
    args = arguments(tmp_path, max_steps=10)
    curves = []
    for make in (lambda m, a: fish(m, a, density=1.0, keep=()), plain_trainer):
        subject, _ = trained(make, "base", args)
        curves.append(torch.tensor([e["loss"] for e in subject.state.log_history if "loss" in e]))
    assert_matches(*curves, terms=100)


def plain_trainer(model, args):
    return Trainer(model, args, train_dataset=dataset())


def test_arguments_reach_the_optimizer(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5)
    for make in (fish, fish_leaves):
        optimizer = make(make_model("base"), args).create_optimizer()
        assert type(optimizer) is FishSparseAdamW
        decayed, plain = optimizer.param_groups
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
        assert (decayed["lr"], decayed["betas"], decayed["eps"]) == (LR, (0.8, 0.9), 1e-5)


def test_options_of_fish_sparse_adamw(tmp_path):
    given = (FishSparseAdamW, {"lr": 0.5, "amsgrad": True})
    subject = fish(make_model("base"), arguments(tmp_path), optimizer_cls_and_kwargs=given)
    (group, _) = subject.create_optimizer().param_groups
    assert (group["lr"], group["amsgrad"]) == (0.5, True)
    assert subject.optimizer_cls_and_kwargs is given
    assert given[1] == {"lr": 0.5, "amsgrad": True}


class OwnAdamW(FishSparseAdamW):
    pass


@pytest.mark.parametrize("make", [fish, fish_leaves])
def test_a_subclass_of_fish_sparse_adamw_gets_the_mask(make, tmp_path):
    given = (OwnAdamW, {"lr": LR})
    subject = make(make_model("base"), arguments(tmp_path), optimizer_cls_and_kwargs=given)
    assert subject.create_optimizer().mask == subject.mask


def test_wrong_options_of_the_optimizer_leave_the_model_as_it_was(tmp_path):
    model = make_model("base")
    trainable = [(n, p.requires_grad) for n, p in model.named_parameters()]
    given = (FishSparseAdamW, {"lr": -1.0})
    subject = fish_leaves(model, arguments(tmp_path), optimizer_cls_and_kwargs=given)
    with pytest.raises(ValueError, match="learning rate"):
        subject.train()
    assert fishkern.attached(model) is None
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == trainable
    subject.optimizer_cls_and_kwargs = (FishSparseAdamW, {"lr": LR})
    subject.train()
    assert fishkern.attached(model).mask == subject.mask


def test_a_mask_for_the_optimizer_is_refused(tmp_path):
    model = make_model("base")
    given = (FishSparseAdamW, {"lr": LR, "mask": mask_of(model).bind(model)})
    with pytest.raises(ValueError, match=r"has a mask, but FishTrainer makes its own"):
        fish(model, arguments(tmp_path), optimizer_cls_and_kwargs=given)


def test_model_init_makes_a_mask_for_each_model(tmp_path):
    subject = FishTrainer(
        args=arguments(tmp_path, max_steps=2),
        train_dataset=dataset(),
        model_init=lambda: make_model("base"),
        train_only=True,
        **OPTIONS,
    )
    ended = []
    for _ in range(2):
        subject.train()
        assert fishkern.attached(subject.model) is not None
        ended.append(weights(subject.model))
    assert_same_weights(*ended)


def test_mixin_in_front_of_another_trainer(tmp_path):
    class Logged(Trainer):
        created = 0

        def create_optimizer(self, *args, **kwargs):
            Logged.created += 1
            return super().create_optimizer(*args, **kwargs)

    class FishLogged(FishTrainer, Logged):
        pass

    args = arguments(tmp_path, max_steps=1)
    subject = FishLogged(make_model("base"), args, train_dataset=dataset(), **OPTIONS)
    subject.train()
    assert Logged.created == 1
    assert type(subject.optimizer.optimizer) is FishSparseAdamW


def test_saved_model_has_its_mask_beside_it(tmp_path):
    subject, ended = trained(fish_leaves, "base", arguments(tmp_path, max_steps=2))
    subject.save_model()
    assert SparseMask.load(tmp_path / MASK_NAME) == subject.mask
    again = type(subject.model).from_pretrained(tmp_path)
    assert_same_weights(again.state_dict(), ended)


def test_a_ready_optimizer_is_refused(tmp_path):
    model = make_model("base")
    ready = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"a ready AdamW was passed.*leave optimizers out"):
        fish(model, arguments(tmp_path), optimizers=(ready, None))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharded_training_is_refused(name, tmp_path, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        setattr(self, f"is_{name.lower()}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=rf"{name} is enabled.*use DDP"):
        fish(make_model("base"), arguments(tmp_path))


def test_copies_of_leaves_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"on 2 GPUs in one process.*torchrun"):
        fish_leaves(make_model("base"), args)


@pytest.mark.parametrize("how", ["optim", "class"])
def test_an_optimizer_without_masks_needs_leaves(how, tmp_path):
    args = arguments(tmp_path, **({"optim": "sgd"} if how == "optim" else {}))
    given = {} if how == "optim" else {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": LR})}
    with pytest.raises(ValueError, match=r"SGD knows no mask: pass train_only=True"):
        fish(make_model("base"), args, **given).train()
    subject = fish_leaves(make_model("base"), args, **given)
    subject.train()
    assert isinstance(subject.optimizer.optimizer, torch.optim.SGD)


def test_a_checkpoint_without_a_mask_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    plain_trainer(make_model("base"), args).train()
    model = make_model("base")
    with pytest.raises(ValueError, match=rf"checkpoint-2' has no {MASK_NAME}"):
        fish(model, args).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same_weights(weights(model), weights(make_model("base")))


def test_another_runs_checkpoint_is_refused_by_a_trained_trainer(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    fish(make_model("base"), args, density=0.05).train()
    subject = fish(make_model("base"), arguments(tmp_path / "other", max_steps=2))
    subject.train()
    with pytest.raises(ValueError, match=r"has trained .* another mask"):
        subject.train(resume_from_checkpoint=tmp_path / "checkpoint-2")


class Once(IterableDataset):
    def __init__(self):
        self.samples = iter(dataset())

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.samples)


class OneIterator(IterableDataset):
    def __init__(self):
        self.samples = iter(dataset())

    def __iter__(self):
        return self.samples


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


def test_streams_are_scored_if_they_can_be_iterated_again(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    for once in (Once, OneIterator):
        with pytest.raises(ValueError, match=rf"{once.__name__} gives one iterator only"):
            fish(make_model("base"), args, train_dataset=once()).train()
    _, by_stream = trained(lambda m, a: fish(m, a, train_dataset=Stream()), "base", args)
    assert_same_weights(
        by_stream, trained(lambda m, a: fish(m, a, train_dataset=Stream()), "base", args)[1]
    )


def test_an_attached_model_is_refused(tmp_path):
    model = make_model("base")
    mask = fish(make_model("base"), arguments(tmp_path)).create_optimizer().mask
    fishkern.train_only(model, mask)
    with pytest.raises(RuntimeError, match=r"train_only is attached"):
        fish(model, arguments(tmp_path)).train()


@pytest.mark.parametrize("train_only", [False, True])
def test_an_optimizer_that_cannot_be_built_leaves_the_weights(train_only, tmp_path):
    """Also where the warmed ones were to be kept."""
    model = make_model("base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = (FishSparseAdamW, {"lr": LR, "no_such_option": 1})
    trainer = fish(
        model, arguments(tmp_path), rewind=False, train_only=train_only,
        optimizer_cls_and_kwargs=given,
    )  # fmt: skip
    with pytest.raises(TypeError, match="no_such_option"):
        trainer.create_optimizer()
    assert fishkern.attached(model) is None
    assert trainer.optimizer_cls_and_kwargs == given
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
