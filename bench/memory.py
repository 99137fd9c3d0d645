"""Peak memory of one call, beyond what was allocated before it.

CUDA: the caching allocator's own high-water mark. CPU: the maximum of the running total of every
allocation and release that torch's profiler reports, including those inside C++ ops. The operating
system's resident size would not do: it includes what malloc keeps for later and what a first call
loads, and depends on what ran before in the process. Neither counts what BLAS and oneDNN allocate
themselves.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `call` holds beyond those allocated before; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    peak = _highest(_allocations(recorded))
    del kept
    return peak


def _allocations(recorded: Any) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0]
    return [int(event["args"]["Bytes"]) for event in sorted(memory, key=lambda event: event["ts"])]


def _highest(changes: list[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest
