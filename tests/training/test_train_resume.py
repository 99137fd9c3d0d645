"""Programs that are killed: the same command again ends with an undisturbed run's bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from programs import module
from pusa_fast.training.config import dump_config
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.trainer import train

Start = Callable[..., Any]
STEPS = 24


@pytest.fixture
def config(tiny: Any) -> Any:
    """Slow enough to be hit: many steps, a checkpoint every three."""
    return tiny.config(
        "cut", steps=STEPS, checkpoints={"every": 3, "keep": 2},
        optim={"schedule": "cosine", "warmup_steps": 5, "ema_decay": 0.9}, data={"caption_dropout": 0.2},
    )  # fmt: skip


def begin(start: Start, config: Any) -> Any:
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(dump_config(config))
    return start(module, "pusa_fast.cli", "train", path)


def wait_for(config: Any, lines: int, process: Any) -> None:
    path, end = config.out / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.is_alive() and time.monotonic() < end, process.finish(5)
        time.sleep(0.01)


def losses(config: Any) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in read_metrics(config.out)]


def assert_as_undisturbed(config: Any) -> None:
    whole = config.model_copy(update={"out": config.out.with_name("whole")})
    train(whole)
    assert losses(config) == losses(whole) and len(losses(whole)) == STEPS
    assert (config.out / "lora.safetensors").read_bytes() == (whole.out / "lora.safetensors").read_bytes()
    assert sorted(p.name for p in (config.out / "checkpoints").iterdir()) == [
        f"step-{n:06d}" for n in (STEPS - 3, STEPS)
    ]


def test_killed_twice(config: Any, start: Start) -> None:
    steps = sorted(random.sample(range(2, STEPS // 2), 2))
    for step in steps:
        process = begin(start, config)
        wait_for(config, step, process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.finish(30)[0] == -signal.SIGKILL
    assert len(losses(config)) < STEPS, f"killed too late ({steps})"
    code, out, err = begin(start, config).finish()
    assert code == 0 and out.splitlines()[-1].startswith("wrote ") and err == "", (steps, err)
    assert_as_undisturbed(config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_asked_to_stop(tiny: Any, start: Start, number: signal.Signals, code: int) -> None:
    endless = tiny.config("cut", steps=100_000, optim={"ema_decay": 0.9}, data={"caption_dropout": 0.2})
    process = begin(start, endless)
    wait_for(endless, 4, process)
    os.kill(process.pid, number)
    found, out, err = process.finish()
    done = len(losses(endless))
    assert found == code, err
    said = f"stopped after step {done} of 100000, with a checkpoint: run the same command again to resume"
    assert out.splitlines()[-1] == said
    assert err.splitlines() == ["stopping after this step, with a checkpoint", *(["interrupted"] if code else [])]
    assert [p.name for p in (endless.out / "checkpoints").iterdir()] == [f"step-{done:06d}"] and done >= 4
    assert not (endless.out / "lora.safetensors").exists()
    runs = [
        endless.model_copy(update={"steps": done + 2, "out": endless.out.with_name(name)}) for name in ("cut", "whole")
    ]
    for config in runs:
        train(config)
    assert losses(runs[0]) == losses(runs[1])
    assert (runs[0].out / "lora.safetensors").read_bytes() == (runs[1].out / "lora.safetensors").read_bytes()
