"""How bench measures: rounds, percentiles, caches, the peak of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pusa_fast.commands import bench as command

timing, memory = (command.load(name) for name in ("timing", "memory"))

CPU = torch.device("cpu")


# Timing and memory.


def test_percentiles() -> None:
    assert [timing.percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], unit=10) == {"median": 35.0, "p20": 20.0, "p80": 50.0, "n": 6}
    with pytest.raises(ValueError, match="no samples"):
        timing.percentile([], 50)


def test_a_ratio_is_taken_within_rounds() -> None:
    """The machine got ten times slower in the middle: the quotient of medians would say 1."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.ratio([2.0, 2.0, 20.0], [1.0, 10.0, 10.0]) == 2.0


def test_rounds_interleave_and_each_starts_with_another() -> None:
    called: list[str] = []
    runs = {name: timing.Run(lambda name=name: called.append(name), lambda: called.append("reset")) for name in "abc"}
    seconds = timing.measure(runs, CPU, budget=0.0, min_rounds=3, warmup=1)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    order = "".join(name for name in called if name != "reset")
    assert order == "abc" + "abc" + "bca" + "cab"
    assert called[::2] == ["reset"] * 12  # before each call, warm-up included


class Clock:
    """Time that only passes when somebody sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_time_of_a_call_excludes_its_reset_and_the_flush(clock: Clock) -> None:
    other = timing.Run(lambda: clock.sleep(2), lambda: clock.sleep(20))
    (values,) = timing.measure({"a": other}, CPU, budget=0.0, flush=lambda: clock.sleep(200), min_rounds=3).values()
    assert values == [2.0] * 3


def test_the_budget_ends_the_rounds(clock: Clock) -> None:
    second = timing.Run(lambda: clock.sleep(1))
    assert len(timing.measure({"a": second}, CPU, budget=5.0, min_rounds=1, warmup=0)["a"]) == 5
    assert len(timing.measure({"a": second}, CPU, budget=0.0, min_rounds=2, warmup=0)["a"]) == 2
    assert len(timing.measure({"a": timing.Run(lambda: None)}, CPU, budget=9.0, max_rounds=4)["a"]) == 4


def test_sizes_of_caches() -> None:
    assert [timing._parse_size(text) for text in ("48K\n", "2M", "512")] == [49_152, 2 << 20, 512]
    assert timing.flush_bytes(CPU) >= 2 * 16 << 10
    assert timing.CacheFlush(CPU, enabled=False).bytes == 0


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> Tensor:
        first = torch.ones(1000)
        second = first + 1  # 8,000 bytes together
        del first
        return second * 2

    assert 8_000 <= memory.peak_bytes(call, CPU) < 8_100  # a scalar or two beside them
    assert memory._highest([100, -100, 60, 30, -60]) == 100
