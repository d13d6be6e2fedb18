"""fishkern: train only the weights that matter, at the cost of those weights."""

from fishkern import functional
from fishkern._dispatch import use_backend

__all__ = ["functional", "use_backend"]
__version__ = "0.1.0"
