"""What the tests of the trainer share: settings, what a run left behind, and interruptions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pusa_fast.testing import make_input
from pusa_fast.training import validation
from pusa_fast.training.data import Batch
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.parallel import World
from pusa_fast.training.preflight import check
from pusa_fast.training.trainer import Trainer, train

TIMINGS = ("seconds", "tokens_per_second", "memory_gib")


# Everything that has a state: a schedule, averages, dropped captions.
STATEFUL: dict[str, Any] = {
    "optim": {"schedule": "cosine", "warmup_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
    "data": {"caption_dropout": 0.2, "validation_clips": 3},
    "validation": {"every": 2},
}
MUON: dict[str, Any] = {
    "lora": None,
    "optim": {"name": "muon", "lr": 1e-3, "muon_lr": 3e-3, "schedule": "cosine", "ema_decay": 0.9},
}
FULL: dict[str, Any] = {"lora": None, "optim": {"lr": 1e-3}}


def begin(config: Any, rank: int = 0, size: int = 1) -> Trainer:
    return Trainer(config, *check(config), World(torch.device("cpu"), rank, size))


def rows(config: Any) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(config.out)]


def losses(config: Any) -> list[float]:
    return [row["loss"] for row in rows(config) if "loss" in row]


def weights(config: Any) -> dict[str, Tensor]:
    return load_file(config.out / ("lora.safetensors" if config.lora else "dit.safetensors"))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(config: Any) -> list[str]:
    return sorted(path.name for path in (config.out / "checkpoints").iterdir())


def trained(made: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.dit.named_parameters() if p.requires_grad}


def first_batch(made: Trainer) -> Batch:
    (batch,) = next(iter(made.data.steps(0)))
    return batch


class Killed(Exception):
    """As sudden as it gets without another process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, config: Any, step: int, before: Callable[[Trainer], None]) -> None:
    """Run until `step` steps are done, then let `before` do what it does."""
    plain = Trainer.train_step

    def counted(self: Trainer, *given: Any) -> dict[str, Any] | None:
        if self.step == step:
            before(self)
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        train(config)


def kill(made: Trainer) -> None:
    raise Killed


def ask(made: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def made_up_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions from thin air in place of the text encoder."""

    class Encoder:
        def encode(self, prompts: list[str]) -> Tensor:
            return make_input(1, 6, 64, seed=len(prompts[0]))

    monkeypatch.setattr(validation, "load_text_encoder", lambda *args: Encoder())
