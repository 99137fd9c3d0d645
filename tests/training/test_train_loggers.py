"""TensorBoard and Weights & Biases get every row of a run; stand-ins record what they are told."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.trainer import train


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    found = ModuleType(name)
    found.__spec__ = ModuleSpec(name, None)
    vars(found).update(contents)
    monkeypatch.setitem(sys.modules, name, found)


class Writer:
    made: list[Writer]

    def __init__(self, folder: str) -> None:
        self.folder, self.told, self.closed = folder, dict[tuple[str, int], float](), False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told[name, step] = value

    def close(self) -> None:
        self.closed = True


class Run:
    def __init__(self) -> None:
        self.rows, self.finished = list[tuple[int, dict[str, float]]](), False

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def test_both_get_every_row(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer.made, begun = [], list[tuple[Run, dict[str, Any]]]()

    def init(**settings: Any) -> Run:
        begun.append((Run(), settings))
        return begun[-1][0]

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    module(monkeypatch, "wandb", init=init)
    changes = {
        "data": {"validation_clips": 2},
        "checkpoints": {"every": 2},
        "logging": {"tensorboard": True, "wandb": "clips"},
    }
    config = tiny.config(steps=2, **changes)
    train(config)
    rows = read_metrics(config.out)
    assert [row["step"] for row in rows] == [1, 2, 2] and "validation_loss" in rows[2]
    (board,), (run, settings) = Writer.made, begun[0]
    assert board.folder == str(config.out / "tensorboard") and board.closed
    assert board.told == {(name, row["step"]): value for row in rows for name, value in numbers(row).items()}
    assert run.rows == [(row["step"], numbers(row)) for row in rows] and run.finished
    assert settings["project"] == "clips" and settings["resume"] is None and settings["config"]["steps"] == 2

    train(tiny.config(steps=4, **changes))  # the same run goes on
    assert begun[1][1]["id"] == settings["id"] and begun[1][1]["resume"] == "allow"
    assert [step for step, _ in begun[1][0].rows] == [3, 4, 4] and {step for _, step in Writer.made[1].told} == {3, 4}


def test_a_logger_that_is_not_installed_is_named_before_anything_is_loaded(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("tensorboard", True), ("wandb", "clips")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            ValueError, match=rf"logging\.{name} is set, but {name} is not installed: pip install {name}"
        ):
            train(tiny.config(logging={name: value}))
