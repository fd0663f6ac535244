"""What every test stands on.

One thread, since the tensors are small and the test processes are several; and `device`, by which tests of
the kernels run on the CPU and, where there is a GPU that this build knows, on it too.
"""

from __future__ import annotations

import pytest
import torch

from l2t import ops

torch.set_num_threads(1)
DEVICES = ["cpu", "cuda"] if ops.HAS_CUDA and torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has kernels."""
    return str(request.param)
