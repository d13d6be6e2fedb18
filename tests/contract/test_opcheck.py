"""torch's own checks of custom ops: schema, fake kernel, autograd, tracing; on every backend."""

import pytest
import torch

from fishkern import _dispatch
from tests.support import op_inputs


@pytest.mark.parametrize(("op", "i"), op_inputs.CASES)
def test_opcheck(backend, op, i):
    if not hasattr(_dispatch.backend(backend)[0], op):
        pytest.skip(f"{backend} has no {op}")
    args, kwargs = op_inputs.case(op, i)
    torch.library.opcheck(getattr(torch.ops.fishkern, op).default, args, kwargs)
