"""Timing: cold caches, providers interleaved by round, medians with 20th and 80th percentiles.

CUDA events time a call on a GPU, `perf_counter` on the CPU. Before each call a buffer larger than
the last-level cache is read, not written: dirty lines would be written back during the next
measurement. Every round calls each provider once, starting with another one each time, so that
drifting clocks and noisy neighbours affect all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FALLBACK_CACHE = 64 << 20
_LARGEST_FLUSH = 512 << 20


@dataclass(frozen=True)
class Run:
    """A timed call; `reset` runs untimed before each (restores what an in-place op destroyed)."""

    call: Callable[[], Any]
    reset: Callable[[], Any] | None = None


class CacheFlush:
    """Evicts a device's last-level cache by reading `bytes`; 0 does nothing: results are warm."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.bytes = min(flush_bytes(device), _LARGEST_FLUSH) if enabled else 0
        self._buffer = torch.ones(self.bytes // 4, device=device)

    def __call__(self) -> None:
        if self.bytes:
            self._buffer.sum()


def flush_bytes(device: torch.device) -> int:
    """Bytes that replace the last-level cache: four times its size on CUDA, twice on the CPU."""
    if device.type == "cuda":
        return 4 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_parse_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return 2 * max(sizes, default=_FALLBACK_CACHE)


def _parse_size(text: str) -> int:
    """ "32K" -> 32768: Linux's notation for cache sizes."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit


def measure(
    runs: Mapping[str, Run],
    device: torch.device,
    budget: float,
    flush: CacheFlush | None = None,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each call by provider, one entry per round, in the order of the rounds.

    Rounds continue until `budget` seconds are spent or `max_rounds` are done, but at least for
    `min_rounds`; `warmup` calls of each come first and are not counted.
    """
    if not runs:
        return {}
    flush = flush or CacheFlush(device, enabled=False)
    timed = _timed_cuda if device.type == "cuda" else _timed_cpu
    for run in runs.values():
        for _ in range(warmup):
            timed(run, device, flush)()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, start, rounds = list(runs), time.perf_counter(), 0
    while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() - start < budget):
        first = rounds % len(names)
        pending = [(name, timed(runs[name], device, flush)) for name in names[first:] + names[:first]]
        for name, result in pending:
            seconds[name].append(result())
        rounds += 1
    return seconds


def _timed_cpu(run: Run, device: torch.device, flush: CacheFlush) -> Callable[[], float]:
    if run.reset is not None:
        run.reset()
    flush()
    start = time.perf_counter()
    run.call()
    spent = time.perf_counter() - start
    return lambda: spent


def _timed_cuda(run: Run, device: torch.device, flush: CacheFlush) -> Callable[[], float]:
    """Does not wait: the flush keeps the device busy while the launches queue up behind it."""
    if run.reset is not None:
        run.reset()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    start.record()
    run.call()
    stop.record()

    def seconds() -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    return seconds


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks. Raises ValueError: no samples."""
    if not samples:
        raise ValueError("percentile of no samples")
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def spread(samples: Sequence[float], unit: float = 1.0, digits: int = 6) -> dict[str, float]:
    """{"median", "p20", "p80", "n"} of samples * unit, rounded to significant digits."""
    values = {name: percentile(samples, p) * unit for name, p in (("median", 50), ("p20", 20), ("p80", 80))}
    return {**{name: significant(value, digits) for name, value in values.items()}, "n": len(samples)}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over rounds of over[i] / under[i]: both ran back to back, so drift cancels."""
    return significant(percentile([a / b for a, b in zip(over, under, strict=True)], 50), 4)


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
