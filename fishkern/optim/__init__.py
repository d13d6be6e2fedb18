"""FishSparseAdamW, file by file.

``optimizer`` is the class, ``arguments`` what it is given, ``wrapping`` what torch puts around its
step; ``roles`` says what is trained of each parameter; ``states`` are dicts that tell when they are
written to; ``plans`` gathers gradients and states for one call of the op, which ``calls`` makes;
``checkpoint`` is ``state_dict`` and back, with the leaves' values in ``masters``; ``remasking`` is
another mask in mid-training, ``cohorts`` the step counts that it makes; ``quantized``
moments in fewer bits; ``scaler`` heeds a GradScaler; ``numerics`` looks at what steps wrote.
"""

from fishkern.optim.numerics import LostUpdateWarning
from fishkern.optim.optimizer import FishSparseAdamW

__all__ = ["FishSparseAdamW", "LostUpdateWarning"]
