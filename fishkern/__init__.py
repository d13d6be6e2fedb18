"""Train only the weights that matter.

Exact per-sample Fisher scores in one backward pass, exact selection, and optimizer state for the
selected weights alone.
"""

from fishkern import functional
from fishkern._dispatch import use_backend
from fishkern.delta import apply_delta, revert_delta, save_delta
from fishkern.interception import Rule, register_rule
from fishkern.ird import select_ird
from fishkern.optim import FishSparseAdamW, LostUpdateWarning
from fishkern.recipe import create_fish_optimizer
from fishkern.scoring.baselines import baseline_scores
from fishkern.scoring.diagonal import FisherDiagonal
from fishkern.scoring.estimate import FisherVerificationError, estimate_fisher
from fishkern.selection.masks import SparseMask
from fishkern.selection.select import select
from fishkern.training.train_only import attached, train_only

__all__ = [
    "FishSparseAdamW",
    "FisherDiagonal",
    "FisherVerificationError",
    "LostUpdateWarning",
    "Rule",
    "SparseMask",
    "apply_delta",
    "attached",
    "baseline_scores",
    "create_fish_optimizer",
    "estimate_fisher",
    "functional",
    "register_rule",
    "revert_delta",
    "save_delta",
    "select",
    "select_ird",
    "train_only",
    "use_backend",
]
__version__ = "0.1.0"
