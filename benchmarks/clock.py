"""How long a call takes: by the wall clock, or on a GPU by its own events with the L2 cache scrubbed."""

from __future__ import annotations

import subprocess
import time

import torch
from cases import Job

SAMPLE_US = 1000.0  # what a sample should last: the CPU's clock is then exact to a part in ten thousand
COPY_BYTES = 1 << 30


class CpuClock:
    """Wall time of this process. The contenders alternate, so each meets caches as the others leave them."""

    def warm_up(self, job: Job) -> int:
        """Runs it and returns how many calls a sample is to have."""
        took = self.sample(job, 1)
        if took < 100 * SAMPLE_US:
            took = min(self.sample(job, 1) for _ in range(3))
        return 1 if job.before else max(1, min(1000, round(SAMPLE_US / took)))

    def sample(self, job: Job, calls: int) -> float:
        """Microseconds a call."""
        if job.before:
            job.before()
        call, turns = job.call, range(calls)
        begin = time.perf_counter_ns()
        for _ in turns:
            call()
        return (time.perf_counter_ns() - begin) / (1000.0 * calls)


class CudaClock:
    """Time on the device between two events around one call.

    Before each call a buffer of twice the L2 cache is overwritten, so that inputs come from memory. That
    keeps the device busy for longer than the host needs to enqueue a kernel, so the time is the device's, and
    the host's only where a contender keeps the device waiting.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.scrub = torch.empty(max(2 * properties.L2_cache_size, 1 << 28), dtype=torch.uint8, device="cuda")

    def warm_up(self, job: Job) -> int:
        for _ in range(3):
            self.sample(job, 1)
        return 1

    def sample(self, job: Job, calls: int) -> float:
        if job.before:
            job.before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scrub.zero_()
        begin.record()
        for _ in range(calls):
            job.call()
        end.record()
        end.synchronize()
        return 1000.0 * begin.elapsed_time(end) / calls


def card() -> dict[str, object]:
    """The GPU, its driver, and the bandwidth (read and written) of a copy between two large buffers."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    room, clock = torch.empty_like(source), CudaClock()
    job = Job(lambda: (room.copy_(source),))
    clock.warm_up(job)
    fastest = min(clock.sample(job, 1) for _ in range(20))
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "card": torch.cuda.get_device_name(0),
        "driver": driver,
        "copy_gb_per_s": round(2 * COPY_BYTES / fastest / 1e3, 1),
    }
