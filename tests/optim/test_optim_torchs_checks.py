"""PyTorch's own lists of options and mistakes for AdamW, and its checks of any optimizer.

Each check is passed without a mask and with a full one. What does not apply: complex parameters and
``differentiable=True`` (refused, see test_optim_errors.py), and what tells one of torch's own
implementations from another (``foreach`` and ``fused`` have no effect here).
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from fishkern.optim import FishSparseAdamW
from tests.support.optim import bits, copies, full_mask, loss_of, make_model, train
from tests.support.tolerances import assert_matches

pytest.importorskip("expecttest", reason="torch's lists of optimizer inputs import expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # of hypothesis, which the lists do not need
    from torch.testing._internal import common_optimizers as lists

ADAMW = next(info for info in lists.optim_db if info.optim_cls is torch.optim.AdamW)
LR = {"lr": 1e-2}
# As for a GPU: with these come the capturable ones, which here run on any device.
INPUTS = ADAMW.optim_inputs_func("cuda", torch.float32)
WAYS = ["no_mask", "full_mask"]
every_input = pytest.mark.parametrize("options", INPUTS, ids=lambda i: i.desc.replace(" ", "_"))
every_way = pytest.mark.parametrize("way", WAYS)


def build(model, way, options=None, **more):
    mask = full_mask(model).bind(model) if way == "full_mask" else None
    return FishSparseAdamW(model.parameters(), **copy.deepcopy(options or {}), **more, mask=mask)


def reference(model, options):
    """AdamW; its capturable form needs a GPU, but computes the same."""
    options = {k: v for k, v in copy.deepcopy(options).items() if k != "capturable"}
    return torch.optim.AdamW(model.parameters(), **options)


def assert_equal(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def assert_tracks(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_matches(a.detach(), b.detach(), terms=16)


def stretch(model):
    """Give every matrix strides of its own, as torch's checks do."""
    for child in model.modules():
        for name, param in list(child.named_parameters(recurse=False)):
            if param.dim() == 2:
                setattr(child, name, nn.Parameter(param.detach().t().contiguous().t()))


@every_way
@every_input
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_adamws_way(contiguous, options, way):
    model = make_model()
    if not contiguous:
        stretch(model)
    other = copy.deepcopy(model)
    first = [loss_of(model, i).item() for i in range(20)]
    sign = -1 if options.kwargs.get("maximize") else 1
    train(model, build(model, way, options.kwargs), 20)
    train(other, reference(other, options.kwargs), 20)
    assert_tracks(model, other)
    assert sign * sum(loss_of(model, i).item() for i in range(20)) < sign * sum(first)


@every_way
@every_input
@pytest.mark.parametrize("schedulers", ADAMW.scheduler_inputs)
def test_goes_adamws_way_with_torchs_schedulers(schedulers, options, way):
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build(models[0], way, options.kwargs), reference(models[1], options.kwargs)]
    for model, optimizer in zip(models, optimizers, strict=True):
        chain = [schedule(optimizer) for schedule in schedulers]
        for i in range(12):
            train(model, optimizer, 1, start=i)
            for scheduler in chain:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss_of(model, i).item()] if plateau else []))
    assert_tracks(*models)


MISTAKES = ADAMW.optim_error_inputs_func("cpu", torch.float32)


def holder_of(params):
    """A module of all tensors in an optimizer's argument, which a mask can be bound to."""
    if isinstance(params, torch.Tensor):
        params = [params]
    tensors = {}
    for entry in params:
        entries = entry["params"] if isinstance(entry, dict) else [entry]
        for one in [entries] if isinstance(entries, torch.Tensor) else entries:
            tensor = one[1] if isinstance(one, tuple) else one
            tensors[id(tensor)] = tensor
    return nn.ParameterList(tensors.values())


@every_way
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.optimizer_error_input.desc)
def test_mistakes_are_refused_as_by_adamw(mistake, way):
    given, kind, words = mistake.optimizer_error_input, mistake.error_type, mistake.error_regex
    params = given.params
    if params is None:
        params = [nn.Parameter(torch.randn(2, 3))]
    if kind is UserWarning:  # torch announces an error for the future
        kind, words = ValueError, "stands twice in its group"
    if way == "full_mask":
        if "groups should be with/without names" in words:
            pytest.skip("a bound mask knows the names of those that come without")
        words = {
            "some parameters appear in more than one parameter group": "pass each parameter once",
            "all optimizer params should be with/without names. Some param names are missing": (
                "name all or none"
            ),
        }.get(words, words)
    holder = holder_of(params)
    mask = full_mask(holder).bind(holder) if way == "full_mask" else None
    assert mistake.error_on is lists.OptimizerErrorEnum.CONSTRUCTION_ERROR
    with pytest.raises(kind, match=words):
        FishSparseAdamW(params, **given.kwargs, mask=mask)


@every_way
@every_input
def test_a_step_without_gradients_does_nothing(options, way):
    model = make_model()
    optimizer = build(model, way, options.kwargs)
    before = copies(model)
    optimizer.step()
    for param in model.parameters():
        param.requires_grad_(False)
    optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


@every_way
@every_input
def test_a_step_with_zero_gradients_decays_at_most(options, way):
    model = make_model()
    optimizer = build(model, way, {**options.kwargs, "weight_decay": 0.0})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = copies(model)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert all(entry["step"] == 2 for entry in optimizer.state.values())


@every_way
def test_empty_parameters_are_stepped_over(way):
    model = nn.ParameterList([torch.zeros(0), torch.ones(2), torch.zeros(0, 3)])
    optimizer = build(model, way, LR)
    for param in model:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert (model[1] < 1).all()
    assert [optimizer.state[p]["exp_avg"].shape for p in model] == [(0,), (2,), (0, 3)]


@every_way
@every_input
def test_a_state_dict_decides_everything_that_follows(options, way):
    """Copied, loaded twice, saved and read with weights_only, and pickled: the same steps."""
    model = make_model()
    optimizer = build(model, way, options.kwargs)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    others = [copy.deepcopy(model) for _ in range(3)]
    loaded = [build(other, way) for other in others]
    for other, state in zip(loaded, [optimizer.state_dict(), read, read], strict=True):
        other.load_state_dict(state)
        assert other.state_dict().keys() == optimizer.state_dict().keys()
        assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    for twin in (copy.deepcopy([model, optimizer]), pickle.loads(pickle.dumps([model, optimizer]))):
        others.append(twin[0])
        loaded.append(twin[1])
    train(model, optimizer, 3, start=3)
    for other, resumed in zip(others, loaded, strict=True):
        train(other, resumed, 3, start=3)
        assert_equal(model, other)
        for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@every_way
@every_input
def test_state_dicts_of_older_versions_are_loaded(options, way):
    """Before a flag was there its default held; before steps were tensors they were numbers."""
    model = make_model()
    options = {**options.kwargs, **dict.fromkeys(ADAMW.not_og_supported_flags, False)}
    options.pop("differentiable")
    optimizer = build(model, way, options)
    train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in ADAMW.not_og_supported_flags:
            del group[flag]
        group.pop("decoupled_weight_decay", None)
    for entry in old["state"].values():
        entry["step"] = float(entry["step"])
    other = copy.deepcopy(model)
    resumed = build(other, way)
    resumed.load_state_dict(old)
    train(model, optimizer, 2, start=2)
    train(other, resumed, 2, start=2)
    assert_equal(model, other)
    assert all(isinstance(entry["step"], torch.Tensor) for entry in resumed.state.values())


@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)])
def test_named_and_unnamed_state_dicts_fit_each_other(named):
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (
        FishSparseAdamW(m.named_parameters() if with_names else m.parameters(), **LR)
        for m, with_names in zip(models, named, strict=True)
    )
    train(models[0], first, 2)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert ("param_names" in second.param_groups[0]) == any(named)
    for i, model in enumerate(models):
        train(model, (first, second)[i], 2, start=2)
    assert_equal(*models)


@every_way
def test_it_can_be_printed(way):
    text = repr(build(make_model(), way, {"lr": 0.25}))
    assert text.startswith("FishSparseAdamW (")
    assert "lr: 0.25" in text
    assert "weight_decay: 0.01" in text


@every_way
def test_hooks_run_in_their_order_and_may_be_removed(way):
    model = make_model()
    optimizer = build(model, way, LR)
    seen = []

    def note(what):
        return lambda *_: seen.append(what)

    handles = [
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_state_dict_pre_hook(note("save pre 2")),
        optimizer.register_state_dict_pre_hook(note("save pre 1"), prepend=True),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 2")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 1"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    everything = [
        *("pre", "post", "save pre 1", "save pre 2", "save post"),
        *("load pre 1", "load pre 2", "load post"),
    ]
    for expected in (everything, []):
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == expected
        seen.clear()
        for handle in handles:
            handle.remove()


@every_way
def test_a_pre_hook_may_replace_the_arguments(way):
    optimizer = build(make_model(), way, LR)
    asked = []
    optimizer.register_step_pre_hook(lambda o, *_: ((o, lambda: asked.append(1)), {}))
    optimizer.step()
    assert asked == [1]


@every_way
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_changes_nothing(default, way):
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, dtype in zip(models, (torch.float32, default), strict=True):
        optimizer = build(model, way, LR)
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            torch.set_default_dtype(dtype)
            try:
                optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
        assert all(entry["step"].dtype == torch.float32 for entry in optimizer.state.values())
    assert_equal(*models)


@every_way
def test_one_group_may_mix_dtypes(way):
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    model = nn.ParameterList(torch.randn(5).to(dtype) for dtype in dtypes)
    truth = nn.ParameterList(param.detach().double() for param in model)
    ours, theirs = build(model, way, LR), torch.optim.AdamW(truth.parameters(), **LR)
    for param, own in zip(model, truth, strict=True):
        param.grad = torch.randn(5).to(param.dtype)
        own.grad = param.grad.double()
    ours.step()
    theirs.step()
    for param, own in zip(model, truth, strict=True):
        assert_matches(param.detach(), own.detach(), param.dtype)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        assert ours.state[param]["exp_avg"].dtype == wide


@every_way
def test_a_first_step_under_autocast_keeps_the_state_wide(way):
    model = make_model()
    optimizer = build(model, way, LR)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, 0).backward()
        optimizer.step()
    assert all(t.dtype == torch.float32 for e in optimizer.state.values() for t in e.values())
