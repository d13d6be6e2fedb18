"""GradScaler: gradients unscaled in the op, steps with infinities skipped and not counted."""

import pytest
import torch

from fishkern.optim import FishSparseAdamW
from tests.support.optim import copies, loss_of, make_mask, make_model, train
from tests.support.tolerances import assert_matches


def scaled_step(model, optimizer, scaler, i, spoil=False, unscale=False):
    optimizer.zero_grad()
    scaler.scale(loss_of(model, i)).backward()
    if spoil:
        model[2].weight.grad[0] = float("inf")
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_training_is_unscaled_training(unscale, capturable):
    models = [make_model(), make_model()]
    models[1].load_state_dict(models[0].state_dict())
    mask = make_mask(models[0])
    plain, scaled = (
        FishSparseAdamW(model.named_parameters(), mask=mask, capturable=capturable)
        for model in models
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(models[0], plain, 10)
    for i in range(10):
        scaled_step(models[1], scaled, scaler, i, unscale=unscale)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert_matches(b.detach(), a.detach(), terms=10)
    assert not hasattr(scaled, "grad_scale")
    assert not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("some", [False, True], ids=["all_grads", "some_grads"])
def test_a_skipped_step_changes_and_counts_nothing(unscale, capturable, some):
    model = make_model()
    if some:
        model[0].bias.requires_grad_(False)
    optimizer = FishSparseAdamW(
        model.named_parameters(), mask=make_mask(model), capturable=capturable
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled_step(model, optimizer, scaler, 0, unscale=unscale)
    before = copies(model)
    moments = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    scaled_step(model, optimizer, scaler, 1, spoil=True, unscale=unscale)
    assert scaler.get_scale() == 2.0
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
    for entry, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(entry["exp_avg"], moment)
    counted = [p for p in model.parameters() if p.requires_grad]
    assert all(optimizer.state[param]["step"] == 1 for param in counted)
    scaled_step(model, optimizer, scaler, 2, unscale=unscale)
    assert all(optimizer.state[param]["step"] == 2 for param in counted)


def test_several_infinities_still_skip_one_step():
    model = make_model()
    optimizer = FishSparseAdamW(model.named_parameters(), mask=make_mask(model), capturable=True)
    loss_of(model, 0).backward()
    optimizer.found_inf = torch.tensor(2.0)  # as where two devices each found some
    optimizer.step()
    assert all(entry["step"] == 0 for entry in optimizer.state.values())


def test_a_users_own_grad_scale_is_divided_out():
    models = [make_model(), make_model()]
    models[1].load_state_dict(models[0].state_dict())
    for model, scale in zip(models, (1.0, 8.0), strict=True):
        optimizer = FishSparseAdamW(model.parameters())
        (loss_of(model, 0) * scale).backward()
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)  # a power of two


def test_the_scaler_unscales_where_it_can():
    """Lightning refuses to clip where it does not."""
    model = make_model()
    mask = make_mask(model)
    plain = FishSparseAdamW(model.named_parameters(), mask=mask)
    capturable = FishSparseAdamW(model.named_parameters(), mask=mask, capturable=True)
    half = FishSparseAdamW(make_model(torch.float16).named_parameters(), mask=mask)
    supports = [o._step_supports_amp_scaling for o in (plain, capturable, half)]
    assert supports == [False, True, True]


def test_float16_gradients_are_unscaled():
    models = [make_model(torch.float16), make_model(torch.float16)]
    models[1].load_state_dict(models[0].state_dict())
    mask = make_mask(models[0])
    optimizers = [FishSparseAdamW(model.named_parameters(), mask=mask) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for model, scale in zip(models, (1.0, 8.0), strict=True):
        for i, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 2.0**-i * scale)
    scaler.scale(torch.ones(()))  # makes the scale
    optimizers[0].step()
    scaler.step(optimizers[1])
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)  # a power of two


@pytest.mark.parametrize("capturable", [False, True])
def test_a_scaler_without_inf_checks_is_refused(capturable):
    model = make_model()
    mask = make_mask(model)
    optimizer = FishSparseAdamW(model.named_parameters(), mask=mask, capturable=capturable)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes the scale
    error, message = AssertionError, "No inf checks were recorded"  # torch's own
    if capturable:
        error, message = RuntimeError, r"found_inf is 0, not a tensor.*call backward"
    with pytest.raises(error, match=message):
        scaler.step(optimizer)
