"""The default loss: what it computes, and what it refuses to guess."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fishkern import estimate_fisher
from fishkern.batches.losses import default_loss, sample_losses, shifts
from tests.support.problems import (
    PROBLEMS,
    SAMPLES,
    TOKENS,
    VOCAB,
    bert,
    classes,
    gpt2,
    ids,
    language,
    llama,
    lora,
    t5,
    text,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


class Output:
    def __init__(self, logits, loss=None):
        self.logits, self.loss = logits, loss


class Model(nn.Module):
    """A model whose output is what the test says."""

    def __init__(self, logits, loss=None):
        super().__init__()
        self.weight, self.logits, self.loss = nn.Parameter(torch.ones(())), logits, loss

    def forward(self, labels=None):
        loss = None if labels is None else self.loss
        return Output(self.weight * self.logits, loss)


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_the_plain_sum_of_the_samples_own_losses(name):
    problem = PROBLEMS[name]
    model, batch = problem.model().eval(), problem.batch()
    losses = default_loss(model)(model, batch)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.sum(), problem.loss(model, batch))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_second_batch_is_as_the_first(name):
    problem = PROBLEMS[name]
    model, batch = problem.model().eval(), problem.batch()
    loss_fn = default_loss(model)
    first = loss_fn(model, batch)
    torch.testing.assert_close(loss_fn(model, batch), first)


def test_a_sample_counts_by_its_tokens_not_by_their_mean():
    model = gpt2().eval()
    batch = language()
    labels = batch["labels"]
    losses = default_loss(model)(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                   position_ids=batch["position_ids"]).logits  # fmt: skip
    for n in range(4):
        expected = sum(
            -logits[n, t - 1].log_softmax(0)[labels[n, t]]
            for t in range(1, TOKENS)
            if labels[n, t] != -100
        )
        torch.testing.assert_close(losses[n], expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("labels", [(4,), (4, 1)])
def test_regression_is_gaussian_with_unit_variance(shape, labels):
    model, y = Model(torch.randn(shape)), torch.randn(labels)
    losses = default_loss(model)(model, {"labels": y})
    torch.testing.assert_close(losses, 0.5 * (model.logits.view(-1) - y.view(-1)) ** 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_classification_takes_any_integer_labels(dtype):
    model, y = Model(torch.randn(4, 2)), torch.tensor([1, 0, 1, 1])
    losses = default_loss(model)(model, {"labels": y.to(dtype)})
    torch.testing.assert_close(losses, F.cross_entropy(model.logits, y, reduction="none"))


def test_losses_of_narrow_logits_are_float32():
    logits = torch.randn(4, 3, dtype=torch.bfloat16)
    losses = sample_losses(Model(logits), logits, torch.tensor([0, 1, 2, 0]))
    assert losses.dtype == torch.float32


def test_an_ignored_label_costs_nothing():
    model = Model(torch.randn(3, 2))
    losses = default_loss(model)(model, {"labels": torch.tensor([1, -100, 0])})
    assert losses[1] == 0
    assert losses[0] > 0


# Which models shift.


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (gpt2, True),
        (llama, True),
        (lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True), True),
        (lambda: lora(bert(transformers.BertForTokenClassification), ["query"]), False),
        (lambda: bert(transformers.BertForMaskedLM), False),
        (t5, False),
    ],
    ids=["gpt2", "llama", "gpt2-lora", "bert-tokens-lora", "bert-masked", "t5"],
)
def test_the_class_decides_whether_to_shift(make, expected):
    assert shifts(make()) is expected


class Unnamed(Model):
    pass


def test_a_class_that_does_not_say_is_refused():
    model = Unnamed(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"Unnamed does not say.*loss_fn\(model, batch\)"):
        default_loss(model)(model, {"labels": torch.randint(5, (2, 3))})


# The model's own loss must be a reduction of ours.


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_model_that_reduces_the_same_loss_is_accepted(reduction):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    model = Model(logits, F.cross_entropy(logits, labels, reduction=reduction))
    assert default_loss(model)(model, {"labels": labels}).shape == (4,)


def test_a_model_with_another_loss_is_refused():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    own = F.cross_entropy(logits, labels, label_smoothing=0.5)
    model = Model(logits, own)
    with pytest.raises(ValueError, match=r"own loss is .*trains on something else.*loss_fn"):
        default_loss(model)(model, {"labels": labels})


def test_shifting_where_the_model_does_not_is_refused():
    class WronglyNamedForCausalLM(Model):
        pass

    logits, labels = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    model = WronglyNamedForCausalLM(logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    with pytest.raises(ValueError, match="trains on something else"):
        default_loss(model)(model, {"labels": labels})


def test_integer_labels_of_a_regression_are_refused():
    batch = classes()  # 0, 1, 2: as float labels they would be fine
    with pytest.raises(ValueError, match=r"logits \[4, 1\] with labels \[4\] of torch.int64"):
        estimate_fisher(bert(num_labels=1), [batch], progress=False)


def test_a_single_class_is_refused_without_an_own_loss_too():
    model = Model(torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"logits \[4, 1\] with labels \[4\] of torch.int64"):
        default_loss(model)(model, {"labels": torch.tensor([0, 1, 2, 0])})


def test_several_labels_per_sample_are_refused():
    batch = classes()
    batch["labels"] = torch.randint(0, 2, (4, 3)).float()
    with pytest.raises(ValueError, match=r"logits \[4, 3\] with labels \[4, 3\].*loss_fn"):
        estimate_fisher(bert(), [batch], progress=False)


def test_logits_longer_than_labels_are_refused():
    model = Model(torch.randn(2, 8, 5))
    model.config = transformers.T5Config()  # an encoder-decoder: not shifted
    with pytest.raises(ValueError, match=r"logits \[2, 8, 5\] with labels \[2, 3\]"):
        default_loss(model)(model, {"labels": torch.randint(5, (2, 3))})


# What cannot be called.


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"no tensor 'labels' \(found: input_ids\).*loss_fn"):
        estimate_fisher(bert(), [{"input_ids": ids(2, 3)}], progress=False)


def test_labels_that_are_no_tensor_are_refused():
    batch = {"input_ids": ids(2, 3), "labels": [0, 1]}
    with pytest.raises(ValueError, match="no tensor 'labels'"):
        estimate_fisher(bert(), [batch], progress=False)


def test_a_batch_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match=r"no tensor 'labels' \(found: tuple\).*loss_fn"):
        estimate_fisher(bert(), [(ids(2, 3), torch.tensor([0, 1]))], progress=False)


def test_an_output_without_logits_is_refused():
    class Bare(nn.Linear):
        def forward(self, x, labels=None):
            return super().forward(x)

    batch = {"x": torch.randn(2, 3), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"returns Tensor without \.logits.*loss_fn"):
        estimate_fisher(Bare(3, 2), [batch], progress=False)


def test_a_forward_without_labels_is_called_without():
    class Plain(Model):
        def forward(self, scale):
            return Output(self.weight * self.logits * scale[:, None])

    model = Plain(torch.randn(2, 3))
    batch = {"scale": torch.ones(2), "labels": torch.tensor([0, 1])}
    loss_fn = default_loss(model)
    for _ in range(2):
        assert loss_fn(model, batch).shape == (2,)


def test_a_type_error_of_the_forward_itself_passes_through():
    class Broken(Model):
        def forward(self, labels=None):
            raise TypeError("my own mistake")

    model = Broken(torch.randn(2, 3))
    with pytest.raises(TypeError, match="my own mistake"):
        default_loss(model)(model, {"labels": torch.tensor([0, 1])})


def test_the_vocabulary_of_the_labels_is_the_models():
    batch = language()
    batch["labels"][0, 4] = VOCAB  # one too many
    with pytest.raises(IndexError, match="out of bounds"):
        estimate_fisher(llama(), [batch], progress=False)


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_virtual_tokens_in_front_have_no_labels(labels):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).eval()
    batch = text(labels=torch.randint(2, VOCAB, (SAMPLES, TOKENS)))
    loss_fn = default_loss(model, labels)
    losses = loss_fn(model, batch)
    assert losses.shape == (SAMPLES,)
    if labels == "empirical":  # the last virtual token predicts the first of the others
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        token = F.cross_entropy(logits[:, 2:-1].transpose(1, 2), batch["labels"], reduction="none")
        torch.testing.assert_close(losses, token.sum(1))
