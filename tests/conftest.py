"""What every test stands on.

One thread, since the tensors are small and the test processes are several; `device`, by which tests of the
kernels run on the CPU and, where there is a GPU that this build knows, on it too; `fresh_dynamo`; and a last
line that says where CUDA kernels have run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_build import where_kernels_ran

from l2t import ops

torch.set_num_threads(1)
DEVICES = ["cpu", "cuda"] if ops.HAS_CUDA and torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has kernels."""
    return str(request.param)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that torch.compile has compiled, or given up on, in other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report.nodeid for report in terminalreporter.getreports("passed")]
    card = torch.cuda.get_device_name() if "cuda" in DEVICES else ""
    terminalreporter.write_line(where_kernels_ran(passed, card))
