"""fishkern: train only the weights that matter, at the cost of those weights."""

from fishkern import functional
from fishkern._dispatch import use_backend
from fishkern.baselines import baseline_scores
from fishkern.diagonal import FisherDiagonal
from fishkern.fisher import FisherVerificationError, estimate_fisher
from fishkern.ird import select_ird
from fishkern.masks import SparseMask, select
from fishkern.optim import FishSparseAdamW
from fishkern.recipe import create_fish_optimizer
from fishkern.train_only import attached, train_only

__all__ = [
    "FishSparseAdamW",
    "FisherDiagonal",
    "FisherVerificationError",
    "SparseMask",
    "attached",
    "baseline_scores",
    "create_fish_optimizer",
    "estimate_fisher",
    "functional",
    "select",
    "select_ird",
    "train_only",
    "use_backend",
]
__version__ = "0.1.0"
