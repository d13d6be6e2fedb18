"""Layers run so that a consumer gets (input, grad_out) in place of a dense weight gradient.

``rules`` says what a rule is and holds the registry; ``linear``, ``embedding``, ``norm`` and
``conv`` register theirs (``selected``: the selected entries of a matrix). ``capture`` runs a
module through its rule and hands over its tensors. For parameters that no rule covers
``elementwise`` follows what a module's own forward multiplies and adds (``put_in``: where it meets
an activation), and ``rerun`` runs a module again for each sample's gradients
(``find_reruns``: which modules can be).
Rules say how squares (``fisher_``) and selected gradients follow from what is handed over; who
consumes it - scoring, ``train_only`` - is not known here.
"""

from fishkern.interception import conv, embedding, linear, norm  # register their rules
from fishkern.interception.capture import (
    ATTACHMENT,
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
    "ATTACHMENT",
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
