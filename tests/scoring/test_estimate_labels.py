"""What holds for labels from the model's own distribution, drawn or expected; what is refused."""

import pytest
import torch
import torch.nn.functional as F

from fishkern import FisherDiagonal, estimate_fisher
from tests.support.labels import Scores, score, seeded, unlabelled
from tests.support.oracle import squared_error
from tests.support.problems import (
    bert,
    classes,
    gpt2,
    ids,
    language,
)
from tests.support.tolerances import SCORE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*use_reentrant:UserWarning"
)


@pytest.mark.parametrize("labels", ["expected", "sampled"])
def test_autocast(labels):
    model, batch = bert(), unlabelled(classes(4))
    plain = score(model, [batch], labels, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, [batch], labels, generator=seeded(0))
    if labels == "expected":  # drawn labels may flip by rounding
        one, other = (torch.cat([s.flatten() for s in f.values()]) for f in (plain, scores))
        assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.99
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in scores.values())


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_one_sample(labels):
    model, x = Scores(5, 2), torch.randn(1, 5)
    scores = score(model, [{"x": x}], labels)
    p = model(x).logits.detach().softmax(1)
    one = x.square() * (p.prod() if labels == "expected" else 1)
    ratios = scores["layer.weight"] / one
    assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=SCORE)
    if labels == "expected":
        torch.testing.assert_close(ratios, torch.ones(2, 5))


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_num_samples_cuts_an_unlabelled_batch(labels):
    model, x = Scores(5, 3), torch.randn(8, 5)
    cut = score(model, [{"x": x}], labels, num_samples=6, generator=seeded(0))
    assert cut == score(model, [{"x": x[:6]}], labels, generator=seeded(0))


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_the_batch_and_the_models_config_stay_as_they_were(labels):
    model, batch = bert(), unlabelled(classes())
    before, keys = model.config.to_dict(), list(batch)
    score(model, [batch], labels)
    assert list(batch) == keys
    assert model.config.to_dict() == before


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_placeholders_of_an_unlabelled_data_set_are_no_labels(labels):
    model, batch = bert(), classes()
    given = {**batch, "labels": torch.full_like(batch["labels"], -1)}
    scores = score(model, [given], labels, generator=seeded(0))
    assert scores == score(model, [unlabelled(batch)], labels, generator=seeded(0))


def test_the_file_says_which_labels(tmp_path):
    scores = score(Scores(4, 2), [{"x": torch.randn(3, 4)}], "expected")
    scores.save(tmp_path / "scores")
    assert FisherDiagonal.load(tmp_path / "scores") == scores
    assert FisherDiagonal.load(tmp_path / "scores").labels == "expected"


def several_labels():
    return {**classes(), "labels": torch.randint(0, 2, (4, 3)).float()}


REFUSED = {
    "unknown": (bert, classes, {"labels": "true"}, ["'true'", "empirical, sampled, expected"]),
    "tokens": (gpt2, language, {"labels": "expected"}, ["[4, 6, 50]", 'labels="sampled"']),
    "loss_fn": (
        bert,
        classes,
        {"labels": "sampled", "loss_fn": squared_error},
        ["'sampled'", "loss_fn chooses its own labels", "draw them there"],
    ),
    "several-labels": (bert, several_labels, {"labels": "sampled"}, ["several labels", "loss_fn"]),
    "several-labels-by-config": (
        lambda: bert(problem_type="multi_label_classification"),
        lambda: unlabelled(classes()),
        {"labels": "expected"},
        ["several labels", "loss_fn"],
    ),
    "another-loss": (
        lambda: Wrong(),
        lambda: {"x": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 0])},
        {"labels": "expected"},
        ["trains on something else"],
    ),
    "labels-of-another-length": (
        lambda: PromptedForTokenClassification(),
        lambda: {"x": torch.randn(4, 5, 3), "labels": ids(4, 4)},
        {"labels": "sampled"},
        ["[4, 5, 3]", "labels [4, 4]", "loss_fn"],
    ),
    "mask-of-another-length": (
        lambda: PromptedForTokenClassification(),
        lambda: {"x": torch.randn(4, 5, 3), "attention_mask": torch.ones(4, 4)},
        {"labels": "sampled"},
        ["[4, 5, 3]", "attention_mask [4, 4]", "pass labels [N, T]"],
    ),
}


class Wrong(Scores):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, labels=None):
        output = super().forward(x)
        output.loss = None if labels is None else F.multi_margin_loss(output.logits, labels)
        return output


class PromptedForTokenClassification(Scores):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x, attention_mask=None):
        return super().forward(x)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    make, batch, kwargs, parts = REFUSED[name]
    model = make()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts are compared below
        estimate_fisher(model, [batch()], progress=False, **kwargs)
    for part in parts:
        assert part in str(caught.value)


def test_a_generator_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"generator is 3: pass a torch\.Generator"):
        score(bert(), [classes()], "sampled", generator=3)
