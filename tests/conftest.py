"""What every test stands on: one thread, since the tensors are small and the test processes are several."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
