"""Each problem of the tests of train_only, with its model."""

import pytest
import torch

from tests.support.training import CASES


@pytest.fixture(params=CASES)
def case(request):
    problem = CASES[request.param]
    torch.manual_seed(1)
    return problem, problem.model().eval()
