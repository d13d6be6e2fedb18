"""Plain torch: the definition of every op, on any device, in any floating dtype.

These functions are the truth that the kernels are tested against (in float64) and the
fallback where no kernel runs. They are written to be read.
"""

from fishkern.backends.packed import by_lists
from fishkern.backends.reference.adamw import masked_adamw_
from fishkern.backends.reference.adamw_quantized import masked_adamw_quantized_
from fishkern.backends.reference.conv import conv_fisher_
from fishkern.backends.reference.embedding import embedding_fisher_
from fishkern.backends.reference.linear import linear_fisher_
from fishkern.backends.reference.norm import norm_fisher_
from fishkern.backends.reference.selected_grad import linear_selected_grad_
from fishkern.backends.reference.topk import topk_indices

__all__ = [
    "DEVICES",
    "conv_fisher_",
    "embedding_fisher_",
    "linear_fisher_",
    "linear_selected_grad_",
    "masked_adamw_",
    "masked_adamw_packed_",
    "masked_adamw_quantized_",
    "norm_fisher_",
    "topk_indices",
    "unavailable",
]

DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")

masked_adamw_packed_ = by_lists(masked_adamw_)


def unavailable() -> str | None:
    """Always available."""
    return None
