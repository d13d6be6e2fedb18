"""FishSparseAdamW, in four files.

``optimizer`` is the class; ``roles`` says what is trained of each parameter; ``launch`` goes from
gradients and states to one call of the op; ``checkpoint`` is ``state_dict`` and back.
"""

from fishkern.optim.optimizer import FishSparseAdamW

__all__ = ["FishSparseAdamW"]
