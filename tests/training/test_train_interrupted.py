"""A run that is interrupted and begun again is the run that was not, to the bit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pusa_fast.training.trainer import Trainer, train
from runs import (
    FULL,
    MUON,
    STATEFUL,
    Killed,
    ask,
    begin,
    interrupt,
    kill,
    losses,
    made_up_captions,
    rows,
    same,
    saved,
    trained,
    weights,
)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_killed_and_resumed_is_as_if_nothing_had_been(
    tiny: Any, finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = {**STATEFUL, "checkpoints": {"every": 2}}
    whole, cut = finished(**settings), tiny.config("cut", **settings)
    before = threading.active_count()
    with pytest.raises(Killed):
        interrupt(monkeypatch, cut, step, kill)
    assert threading.active_count() == before
    assert begin(cut).step == step // 2 * 2
    train(cut)
    assert rows(cut) == rows(whole) and len(rows(whole)) == 6 + 3
    assert same(weights(cut), weights(whole))
    a, b = begin(whole), begin(cut)
    assert a.average is not None and b.average is not None and same(a.average.tensors, b.average.tensors)
    assert same(trained(a), trained(b)) and not same(trained(a), a.average.tensors)


@pytest.mark.parametrize("changes", [MUON, FULL], ids=["muon", "adamw"])
def test_full_fine_tuning_resumes(tiny: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    whole, cut = (tiny.config(name, **changes) for name in ("whole", "cut"))
    train(whole)
    interrupt(monkeypatch, cut, 2, ask)
    done = train(cut)
    assert done.weights == cut.out / "dit.safetensors"
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_stopped_by_a_signal_leaves_a_checkpoint(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (tiny.config(name, **STATEFUL) for name in ("whole", "cut"))
    train(whole)
    outcomes = []
    plain = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: outcomes.append(plain(self)) or outcomes[-1])
    interrupt(monkeypatch, cut, 2, ask)
    assert (outcomes[0].step, outcomes[0].signal, outcomes[0].weights) == (3, signal.SIGTERM, None)
    assert saved(cut)[-1] == "step-000003" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(cut)
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_an_interrupt_asked_twice_does_not_wait(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config()

    def twice(made: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, config, 2, twice)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_finished_run_started_again_writes_the_same(tiny: Any) -> None:
    config = tiny.config(**STATEFUL, checkpoints={"every": 2})
    train(config)
    first, told = weights(config), rows(config)
    (config.out / "lora.safetensors").unlink()
    assert train(config).step == 6
    assert same(weights(config), first) and rows(config) == told


def test_a_constant_rate_goes_on_for_more_steps(tiny: Any) -> None:
    longer, short = (
        tiny.config("a", steps=6, checkpoints={"every": 3}),
        tiny.config("b", steps=3, checkpoints={"every": 3}),
    )
    train(longer)
    train(short)
    train(short.model_copy(update={"steps": 6}))
    assert rows(short) == rows(longer) and same(weights(short), weights(longer))


def test_validation_previews_and_memory_change_no_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tiny.config("bare", memory={"checkpointing": "none"}, data={"validation_clips": 2})
    full = tiny.config(
        "full", data={"validation_clips": 2}, memory={"checkpointing": "block", "offload": True},
        validation={"every": 2, "samples": [{"prompt": "a"}], "steps": 2, "guidance_scale": 2.0},
    )  # fmt: skip
    made_up_captions(monkeypatch)
    train(bare)
    train(full)
    assert losses(full) == losses(bare) and same(weights(full), weights(bare))
