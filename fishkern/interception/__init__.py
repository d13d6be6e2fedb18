"""Layers run so that a consumer gets (input, grad_out) in place of a dense weight gradient.

``rules`` knows what a layer type computes, ``capture`` runs it and hands over its tensors.
Who consumes them - Fisher accumulation, the selected gradient - is not known here.
"""

from fishkern.interception import conv, embedding, linear, norm  # register their rules
from fishkern.interception.capture import (
    Site,
    exchange_class,
    intercepted,
    is_transformed,
    original_parameters,
    run_intercepted,
    subclass,
)
from fishkern.interception.rules import (
    Rule,
    Selection,
    original_class,
    register_rule,
    registered,
    rule_for,
)

__all__ = [
    "Rule",
    "Selection",
    "Site",
    "conv",
    "embedding",
    "exchange_class",
    "intercepted",
    "is_transformed",
    "linear",
    "norm",
    "original_class",
    "original_parameters",
    "register_rule",
    "registered",
    "rule_for",
    "run_intercepted",
    "subclass",
]
