"""The default loss: each sample's negative log-likelihood, summed over its own labels.

``-log p(y_n | x_n)`` is a sum over the sample's tokens, never a mean: the Fisher information
squares its gradient, and a mean would weigh the samples by their lengths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishkern.batches import samples
from fishkern.batches.labels import Draws, expected_terms
from fishkern.batches.packing import SAMPLE_IDS, Packing, packing_of

LossFn = Callable[[nn.Module, Any], Tensor]

IGNORED = -100
_REMEDY = "pass loss_fn(model, batch) -> per-sample losses [N]"
_DRAWN = "_fishkern_drawn"  # the key of drawn labels in a batch of our own


def default_loss(model: nn.Module, labels: str = "empirical", draws: Draws | None = None) -> LossFn:
    """A loss for models whose output has ``.logits``; it checks itself on the first batch.

    Classification ([N, C] logits, integer labels), regression ([N] or [N, 1], float labels,
    Gaussian with unit variance: ``0.5 (y - f)^2``), and tokens ([N, T, C]; shifted by one for
    causal language models and for nothing else), -100 ignored. Packed sequences: tokens only.

    ``labels``: "empirical": the batch's. "sampled": drawn by ``draws`` in the first forward of a
    batch, which must be a dict: it keeps them for the passes that follow. "expected": the losses
    are ``[K, N]``, as ``expected_terms`` has them. The last two need no labels in the batch; but
    -100 among them leaves samples and tokens out, an encoder-decoder's are its inputs, and the
    check is made with them.
    """
    empirical = labels == "empirical"
    checked = False

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal checked
        given = _labels(batch, needed=empirical)
        needed = _needs_labels(model) or not checked
        pass_labels = needed and given is not None and (empirical or not _are_placeholders(given))
        outputs = _call(model, batch, with_labels=pass_labels)
        logits = _logits(outputs)
        given, packing = _with_virtual_tokens(model, logits, given), packing_of(batch)
        if not empirical:
            _require_one_label(model, logits, given)
        if pass_labels and not checked and given is not None:
            own = sample_losses(model, logits.detach(), given, packing)
            if checked := bool(own.any()):  # else every label is ignored: nothing to compare
                _check_own_loss(model, outputs, own, given)
        if labels == "expected":
            return _expected_losses(logits, given)
        if labels == "sampled":
            if _DRAWN not in batch:
                batch[_DRAWN] = _draw_labels(model, logits.detach(), given, batch, draws)
            given = batch[_DRAWN]
        assert given is not None
        return sample_losses(model, logits, given, packing)

    return loss_fn


def sample_losses(
    model: nn.Module, logits: Tensor, labels: Tensor, packing: Packing | None = None
) -> Tensor:
    """Per-sample negative log-likelihoods [N], in float32 (float64 of float64).

    Raises:
        ValueError: The shapes and dtypes are none that the default loss knows.
    """
    logits = _wide(logits)
    integer = not (labels.is_floating_point() or labels.is_complex())
    if packing is not None:
        return _packed_losses(model, logits, labels, packing)
    if logits.dim() == 3 and integer and labels.shape[:1] == logits.shape[:1]:
        if shifts(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.shape[:2] == labels.shape:
            token = F.cross_entropy(
                logits.transpose(1, 2), labels.long(), ignore_index=IGNORED, reduction="none"
            )
            return token.sum(1)
    classes = logits.shape[1] if logits.dim() == 2 else 0
    if classes > 1 and integer and labels.numel() == len(logits):  # of one class: no information
        return F.cross_entropy(logits, labels.view(-1).long(), reduction="none")
    if not integer and labels.numel() == logits.numel() == len(logits):
        return 0.5 * (logits.view(-1) - labels.view(-1).to(logits.dtype)).square()
    raise ValueError(
        f"no default loss for logits {list(logits.shape)} with labels {list(labels.shape)} of "
        f"{labels.dtype}; {_REMEDY}"
    )


def _packed_losses(model: nn.Module, logits: Tensor, labels: Tensor, packing: Packing) -> Tensor:
    """Of token logits ``[B, T, C]``: no token predicts the first one of the next sample."""
    size = packing.sample_ids.shape
    if logits.dim() != 3 or not logits.shape[:2] == labels.shape == size:
        raise ValueError(
            f"{SAMPLE_IDS} {list(size)} need logits [B, T, C] and labels [B, T], not "
            f"{list(logits.shape)} and {list(labels.shape)}; {_REMEDY}"
        )
    shift = int(shifts(model))
    if shift:
        logits = logits[:, :-1]
        labels = labels.masked_fill(packing.starts(), IGNORED)[:, 1:]
    token = F.cross_entropy(
        logits.transpose(1, 2), labels.long(), ignore_index=IGNORED, reduction="none"
    )
    return packing.by_sample(F.pad(token, (shift, 0)), fill=0.0).sum(1)


def require_losses(losses: Any, batch: Any, size: int | None) -> Tensor:
    """What a loss_fn returned, if it is one loss per sample.

    ``size``: how many; None: as many as the batch's tensors have entries, where they agree
    (not those of a list with an entry per sample).

    Raises:
        ValueError: It is not.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss_fn returned {found}: return one loss per sample, a tensor [N] "
            f'(reduction="none", then a sum over tokens)'
        )
    if size is None and not (isinstance(batch, list) and len(batch) == len(losses)):
        size = samples.common_length(batch)
    if size is not None and len(losses) != size:
        raise ValueError(
            f"loss_fn returned {len(losses)} losses for a batch of {size} samples: "
            f"return one loss per sample"
        )
    return losses


def shifts(model: nn.Module) -> bool:
    """Whether token t's logits predict label t + 1: decided by the model's class.

    Raises:
        ValueError: The class does not say.
    """
    name = type(base_model(model)).__name__
    if is_encoder_decoder(model) or re.search("ForTokenClassification|ForMaskedLM", name):
        return False
    if re.search("ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel", name):
        return True
    raise ValueError(
        f"{name} does not say whether its logits are shifted against the labels (it is called "
        f"neither ForCausalLM, ForTokenClassification nor ForMaskedLM); {_REMEDY}"
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model makes its decoder's inputs from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _needs_labels(model: nn.Module) -> bool:
    """Models of transformers run without labels; of others it is not known."""
    return is_encoder_decoder(model) or not hasattr(model, "config")


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper."""
    inner = getattr(model, "get_base_model", None)
    base: nn.Module = inner() if callable(inner) else model
    return base


def _labels(batch: Any, needed: bool) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None and isinstance(batch, Mapping) and not needed:
        return None
    if not isinstance(labels, Tensor):
        found = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"the batch has no tensor 'labels' (found: {found}); {_REMEDY}")
    return labels


def _call(model: nn.Module, batch: Mapping[str, Any], *, with_labels: bool) -> Any:
    """The model's outputs. Its own loss costs time, so labels are left out once it was checked."""
    batch = {key: value for key, value in batch.items() if key not in (_DRAWN, SAMPLE_IDS)}
    if with_labels:
        try:
            return model(**batch)
        except TypeError as error:
            if "labels" not in str(error):
                raise  # the caller's own error, not a forward without labels
    return model(**{key: value for key, value in batch.items() if key != "labels"})


def _logits(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns {type(outputs).__name__} without .logits; {_REMEDY}")
    return logits


def _with_virtual_tokens(model: nn.Module, logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Labels [N, V + T] where PEFT puts V virtual tokens, which have none, in front of T others."""
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    if labels is None or labels.dim() != 2 or logits.dim() != 3 or not virtual:
        return labels
    longer = logits.shape[1] - labels.shape[1] == virtual
    return F.pad(labels, (virtual, 0), value=IGNORED) if longer else labels


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _are_placeholders(labels: Tensor) -> bool:
    """Whether they are those of an unlabelled data set (GLUE's test files have -1)."""
    if labels.is_floating_point():
        return False
    return bool(((labels < 0) & (labels != IGNORED)).any())


def _require_one_label(model: nn.Module, logits: Tensor, given: Tensor | None) -> None:
    """The model must say what its distribution is: a softmax, or a Gaussian of one value.

    Raises:
        ValueError: It does not.
    """
    problem = getattr(getattr(base_model(model), "config", None), "problem_type", None)
    values = given is not None and given.is_floating_point()
    one = logits.numel() == len(logits)
    if problem == "multi_label_classification" or (logits.dim() == 2 and values and not one):
        raise ValueError(
            f"the model has logits {list(logits.shape)} with several labels a sample "
            f"(multi-label, or regression on several values), which only a loss_fn knows the "
            f"distribution of: draw the labels there; {_REMEDY}"
        )
    if not (one or logits.dim() == 3 or (logits.dim() == 2 and logits.shape[1] > 1)):
        raise ValueError(f"no default loss for logits {list(logits.shape)}; {_REMEDY}")


def _expected_losses(logits: Tensor, given: Tensor | None) -> Tensor:
    """``expected_terms`` [K, N] of the samples that are not ignored."""
    if logits.dim() == 3:
        raise ValueError(
            f'labels="expected" sums over the labels of a sample, and the logits '
            f'{list(logits.shape)} give one to each token: pass labels="sampled"'
        )
    one = logits.numel() == len(logits)
    terms = expected_terms(_wide(logits).view(-1) if one else _wide(logits))
    return terms * _counted_samples(given, len(logits), logits.device)


def _draw_labels(
    model: nn.Module,
    logits: Tensor,
    given: Tensor | None,
    batch: Mapping[str, Any],
    draws: Draws | None,
) -> Tensor:
    """Labels by the model's own distribution, -100 where the batch leaves a position out."""
    logits, draws = _wide(logits), draws or Draws()
    if logits.numel() == len(logits):
        return draws.values(logits.view(-1))
    if logits.dim() == 2:
        counted = _counted_samples(given, len(logits), logits.device)
    else:
        counted = _counted_tokens(model, logits, given, batch)
    labels = torch.full(counted.shape, IGNORED, device=logits.device)
    target = labels
    if logits.dim() == 3 and shifts(model):
        logits, counted, target = logits[:, :-1], counted[:, 1:], labels[:, 1:]
    # The draws depend on what is counted alone: not on the padding.
    target[counted] = draws.classes(logits[counted])
    return labels


def _counted_samples(given: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Which samples [N] are not ignored."""
    if given is None or given.is_floating_point() or given.numel() != size:
        return torch.ones(size, dtype=torch.bool, device=device)
    return given.view(-1).ne(IGNORED)


def _counted_tokens(
    model: nn.Module, logits: Tensor, given: Tensor | None, batch: Mapping[str, Any]
) -> Tensor:
    """Which positions [N, T] have a label: those of the labels, else those that are no padding."""
    name = "decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask"
    mask = given if given is not None else batch.get(name)
    if not isinstance(mask, Tensor):
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if mask.shape != logits.shape[:2]:
        raise ValueError(
            f"the logits {list(logits.shape)} do not fit the batch's "
            f"{'labels' if given is not None else name} {list(mask.shape)}: pass labels [N, T] "
            f"with {IGNORED} where none is to be drawn, or {_REMEDY.removeprefix('pass ')}"
        )
    if given is not None:
        return mask.ne(IGNORED)
    counted = mask.bool()
    if shifts(model):  # a pad predicts nothing
        counted = counted & counted.roll(1, 1)
    return counted


def _check_own_loss(model: nn.Module, outputs: Any, losses: Tensor, labels: Tensor) -> None:
    """The model's own loss must be a reduction of ours; else we would score something else."""
    own = getattr(outputs, "loss", None)
    if not isinstance(own, Tensor) or own.numel() != 1:
        return
    total, num_samples = losses.sum().double(), len(losses)
    reductions = {"sum": total, "mean over samples": total / num_samples}
    if labels.dim() > 1 and not labels.is_floating_point():
        counted = labels[:, 1:] if shifts(model) else labels
        num_tokens = (counted != IGNORED).sum().clamp(min=1)
        reductions["mean over tokens"] = total / num_tokens
    if labels.is_floating_point():
        reductions["mean squared error"] = 2 * total / num_samples  # ours has the factor 0.5
    narrow = torch.is_autocast_enabled(own.device.type) or _is_narrow(outputs.logits.detach())
    tolerance = 5e-2 if narrow else 1e-3
    if any(
        torch.allclose(own.double(), value, rtol=tolerance, atol=tolerance * 1e-2)
        for value in reductions.values()
    ):
        return
    found = ", ".join(f"{name} {value.item():.5g}" for name, value in reductions.items())
    raise ValueError(
        f"the model's own loss is {own.item():.5g}, but the default loss gives {found}: "
        f"{type(base_model(model)).__name__} trains on something else; {_REMEDY}"
    )


def _is_narrow(logits: Tensor) -> bool:
    """Whether a narrow dtype holds these values, whatever dtype they are handed over in.

    Autocast inside the forward (accelerate's, say) leaves nothing else to see from outside.
    """
    return any(torch.equal(logits.to(t), logits) for t in (torch.float16, torch.bfloat16))
