"""Layers run so that a consumer gets (input, grad_out) in place of a dense weight gradient.

``rules`` knows what a layer type computes, ``capture`` runs it and hands over its tensors.
Who consumes them - Fisher accumulation, the selected gradient - is not known here.
"""

from fishkern.interception import linear  # registers its rules
from fishkern.interception.capture import (
    Site,
    can_intercept,
    exchange_class,
    intercepted,
    original_class,
    original_parameters,
    run_intercepted,
    subclass,
)
from fishkern.interception.rules import Rule, register_rule, rule_for

__all__ = [
    "Rule",
    "Site",
    "can_intercept",
    "exchange_class",
    "intercepted",
    "linear",
    "original_class",
    "original_parameters",
    "register_rule",
    "rule_for",
    "run_intercepted",
    "subclass",
]
