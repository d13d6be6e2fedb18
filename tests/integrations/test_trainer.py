"""transformers' Trainer with FishSparseAdamW and with train_only, unbroken and resumed."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, trainer

import fishkern
from fishkern import FishSparseAdamW
from fishkern.integrations.transformers import fish_optimizer_factory
from tests.support.loops import (
    DECAY,
    HEAD,
    LR,
    arguments,
    check_resumed,
    dataset,
    make_model,
    mask_of,
    trained,
    weights,
)
from tests.support.tolerances import MODEL, assert_matches

# said by some releases of PEFT on saving, of a base model that came from no folder
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")


def ready(model, args):
    optimizer = FishSparseAdamW(model.named_parameters(), lr=LR, mask=mask_of(model))
    return Trainer(model, args, train_dataset=dataset(), optimizers=(optimizer, None))


def by_class(model, args):
    kwargs = {"mask": mask_of(model).bind(model), "lr": LR}
    return Trainer(
        model, args, train_dataset=dataset(), optimizer_cls_and_kwargs=(FishSparseAdamW, kwargs)
    )


def by_factory(model, args):
    if not hasattr(trainer, "is_optimizer_factory"):
        pytest.skip("this release of transformers knows no optimizer factories")
    data = torch.utils.data.default_collate(dataset()[:16])
    kwargs = {"batches": [data], "density": 0.1, "lr": LR, "keep": HEAD, "progress": False}
    kwargs |= {"num_samples": 16, "warmup_steps": 1}
    return Trainer(
        model,
        args,
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(fish_optimizer_factory, kwargs),
    )


def leaves_by_factory(model, args):
    subject = by_factory(model, args)
    subject.optimizer_cls_and_kwargs[1]["train_only"] = True
    return subject


def leaves_by_adamw(model, args):
    fishkern.train_only(model, mask_of(model))
    return Trainer(model, args, train_dataset=dataset())  # nothing of fishkern's in it


def leaves_by_class(model, args):
    fishkern.train_only(model, mask_of(model))
    return by_class_on_leaves(model, args)


def by_class_on_leaves(model, args):
    mask = fishkern.attached(model).mask.bind(model)
    return Trainer(
        model,
        args,
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(FishSparseAdamW, {"mask": mask, "lr": LR}),
    )


FORMS = [ready, by_class, by_factory, leaves_by_factory, leaves_by_adamw, leaves_by_class]


@pytest.mark.parametrize("kind", ["lora", "base"])
@pytest.mark.parametrize("make", FORMS)
def test_resumed_is_unbroken(make, kind, tmp_path):
    check_resumed(make, kind, tmp_path)


@pytest.mark.parametrize("make", [ready, by_class, leaves_by_class])
def test_resumed_is_unbroken_in_bfloat16(make, tmp_path):
    subject, _ = check_resumed(make, "bf16", tmp_path)
    moments = [entry["exp_avg"].dtype for entry in subject.optimizer.state.values()]
    assert set(moments) == {torch.float32}


@pytest.mark.parametrize("make", [by_class, leaves_by_adamw])
@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.01}],
    ids=lambda options: next(iter(options)),
)
def test_resumed_is_unbroken_under(make, options, tmp_path):
    check_resumed(make, "base", tmp_path, **options)


def test_what_is_not_selected_keeps_its_bits(tmp_path):
    for make in (by_class, leaves_by_adamw):
        before = weights(make_model("base"))
        _, after = trained(make, "base", arguments(tmp_path))
        mask = mask_of(make_model("base"))
        for name, index in mask.items():
            selected = torch.zeros(after[name].numel(), dtype=torch.bool)
            selected[index.long()] = True
            changed = (after[name] != before[name]).flatten()
            assert not (changed & ~selected).any()
        assert sum((after[name] != before[name]).sum() for name in mask) > mask.num_selected / 2


def test_ways_train_the_same_weights(tmp_path):
    """In one step, from the same random state; later, rounding goes through Adam's divisions."""
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0)
    _, plain = trained(by_class, "base", args)
    for make in (leaves_by_adamw, leaves_by_class):
        _, leaves = trained(make, "base", args)
        for name, value in plain.items():
            assert_matches(leaves[name], value, terms=100)


def test_full_mask_has_the_loss_curve_of_adamw(tmp_path):
    def full(model, args):
        mask = fishkern.SparseMask(
            {n: torch.arange(p.numel()) for n, p in model.named_parameters()},
            {n: p.shape for n, p in model.named_parameters()},
        )
        kwargs = {"mask": mask.bind(model), "lr": LR}
        return Trainer(
            model, args, train_dataset=dataset(), optimizer_cls_and_kwargs=(FishSparseAdamW, kwargs)
        )

    def dense(model, args):
        return Trainer(model, args, train_dataset=dataset())

    args = arguments(tmp_path, lr_scheduler_type="cosine", max_steps=10)
    curves = []
    for make in (full, dense):
        subject, _ = trained(make, "base", args)
        curves.append(torch.tensor([e["loss"] for e in subject.state.log_history if "loss" in e]))
    assert len(curves[0]) == 10
    assert_matches(*curves, terms=100)


def test_decay_groups_are_the_trainers(tmp_path):
    for make in (by_class, leaves_by_adamw, leaves_by_class):
        subject = make(make_model("base"), arguments(tmp_path))
        decayed, plain = subject.create_optimizer().param_groups
        assert (decayed["weight_decay"], plain["weight_decay"]) == (DECAY, 0.0)
        if "param_names" in plain:
            assert all("bias" in name or "LayerNorm" in name for name in plain["param_names"])
            assert all(name.endswith("weight") for name in decayed["param_names"])
        shapes = {p.dim() for p in decayed["params"]}
        assert shapes == ({2} if make is by_class else {1})


def test_clipping_sees_dense_gradients_or_selected_ones(tmp_path):
    args = arguments(tmp_path, max_steps=1, max_grad_norm=1e-3)
    norms = {}
    for make in (by_class, leaves_by_adamw):
        subject, _ = trained(make, "base", args)
        norms[make] = subject.state.log_history[0]["grad_norm"]

    grads = {}

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters()})

    model, unclipped = make_model("base"), arguments(tmp_path, max_steps=1, max_grad_norm=0)
    Trainer(model, unclipped, train_dataset=dataset(), callbacks=[Record()]).train()
    dense = torch.cat([grad.flatten() for grad in grads.values()]).double().norm()
    mask = mask_of(model)
    selected = torch.cat([grads[n].flatten()[i.long()] for n, i in mask.items()]).double().norm()
    assert norms[by_class] == pytest.approx(dense.item(), rel=MODEL)
    assert norms[leaves_by_adamw] == pytest.approx(selected.item(), rel=MODEL)
    assert selected < 0.95 * dense
