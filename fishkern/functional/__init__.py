"""The direct door to the ops: checked, documented functions over tensors.

Each is also ``torch.ops.fishkern.<name>``, with a fake kernel, so that it can stand inside
``torch.compile(fullgraph=True)``. A name that ends in an underscore changes its arguments in
place and returns None. All accumulation is in float32 (in float64 where the accumulator is
float64, which the plain-torch backend accepts).
"""

from fishkern.functional.adamw import masked_adamw_
from fishkern.functional.adamw_quantized import (
    dequantize_moment,
    masked_adamw_quantized_,
    quantize_moment,
)
from fishkern.functional.conv import conv_fisher_
from fishkern.functional.embedding import embedding_fisher_
from fishkern.functional.linear import linear_fisher_
from fishkern.functional.norm import norm_fisher_
from fishkern.functional.selected_grad import (
    SelectedGradPlan,
    linear_selected_grad_,
    plan_selected_grad,
    restrict_columns,
    restrict_rows,
)
from fishkern.functional.topk import topk_indices

__all__ = [
    "SelectedGradPlan",
    "conv_fisher_",
    "dequantize_moment",
    "embedding_fisher_",
    "linear_fisher_",
    "linear_selected_grad_",
    "masked_adamw_",
    "masked_adamw_quantized_",
    "norm_fisher_",
    "plan_selected_grad",
    "quantize_moment",
    "restrict_columns",
    "restrict_rows",
    "topk_indices",
]
