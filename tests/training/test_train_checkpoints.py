"""Checkpoints: which of them stay, which are refused, and that a full disk destroys none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pusa_fast.data.lock import alone
from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.testing import make_input
from pusa_fast.training.data import Batch
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.trainer import Trainer, train
from pusa_fast.weights import checkpoint, keymap, load_dit
from runs import begin, rows, same, saved, weights


def test_the_last_ones_and_the_best_stay(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, float("nan"), 1.5, 2.5])
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: next(values))
    config = tiny.config(checkpoints={"every": 1, "keep": 2}, validation={"every": 1})
    train(config)
    assert saved(config) == ["best.json", "step-000002", "step-000005", "step-000006"]
    assert json.loads((config.out / "checkpoints" / "best.json").read_text()) == {"step": 2, "loss": 1.0}


def test_a_best_that_was_deleted_is_no_best(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: next(values))
    config = tiny.config(steps=2, checkpoints={"every": 1, "keep": 1}, validation={"every": 1})
    train(config)
    train(config.model_copy(update={"steps": 3}))
    assert saved(config) == ["best.json", "step-000002", "step-000003"]
    shutil.rmtree(config.out / "checkpoints" / "step-000002")
    train(config.model_copy(update={"steps": 4}))
    assert json.loads((config.out / "checkpoints" / "best.json").read_text()) == {"step": 4, "loss": 2.5}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"lora": {"rank": 8}}, "lora.rank was 4, is 8"),
        ({"optim": {"lr": 0.5}}, "optim.lr was 0.01, is 0.5"),
        ({"lora": None}, "lora was"),
        ({"data": {"validation_clips": 1}}, "data.validation_clips was 0, is 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tiny: Any, changes: dict[str, Any], named: str) -> None:
    train(tiny.config(steps=1, checkpoints={"every": 1}))
    with pytest.raises(ValueError, match="another configuration") as caught:
        train(tiny.config(**changes))
    assert named in str(caught.value) and "Give another out" in str(caught.value)


def test_a_moved_base_goes_on_and_another_one_does_not(tiny: Any) -> None:
    train(tiny.config(steps=1, checkpoints={"every": 1}))
    shutil.copy(tiny.dit, tiny.runs / "moved.safetensors")
    assert train(tiny.config(steps=2, dit=str(tiny.runs / "moved.safetensors"))).step == 2
    other = load_dit(tiny.dit)
    torch.nn.init.normal_(other.head.head.bias)
    checkpoint.save(tiny.runs / "other.safetensors", keymap.unpack(other.state_dict()), other.config)
    with pytest.raises(ValueError, match="another configuration: weights was"):
        train(tiny.config(steps=3, dit=str(tiny.runs / "other.safetensors")))
    with pytest.raises(ValueError, match=r"another configuration: dtype was 'torch\.float32', is 'torch\.bfloat16'"):
        train(tiny.config(steps=3, dtype="bfloat16"))


def test_fewer_steps_than_were_taken_are_refused(tiny: Any) -> None:
    train(tiny.config(steps=3))
    with pytest.raises(ValueError, match="is at step 3, past steps 2: raise steps"):
        train(tiny.config(steps=2))


def test_the_best_validation_loss_is_kept_wherever_it_falls(tiny: Any) -> None:
    config = tiny.config(
        steps=5, data={"validation_clips": 2}, validation={"every": 1}, checkpoints={"every": 0, "keep": 1}
    )
    train(config)
    losses = [row["validation_loss"] for row in read_metrics(config.out) if "validation_loss" in row]
    best = json.loads((config.out / "checkpoints" / "best.json").read_text())
    assert best == {"step": 1 + losses.index(min(losses)), "loss": min(losses)}
    assert f"step-{best['step']:06d}" in saved(config)


def test_a_stop_between_two_parts_drops_the_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (tiny.config(name, accumulate=2, steps=4) for name in ("whole", "cut"))
    train(whole)
    asked: list[int] = []
    plain = Trainer.loss

    def loss(self: Trainer, batch: Batch) -> Any:
        if self.step == 2 and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch)

    monkeypatch.setattr(Trainer, "loss", loss)
    assert train(cut).step == 2 and saved(cut) == ["step-000002"]
    train(cut)
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_other_clips_are_refused_and_moved_ones_are_not(tiny: Any) -> None:
    config = tiny.config(steps=1, checkpoints={"every": 1})
    train(config)
    shutil.copytree(tiny.clips, tiny.runs / "moved")
    moved = tiny.config(steps=2, data={"path": str(tiny.runs / "moved")})
    assert train(moved).step == 2
    with StoreWriter(tiny.runs / "moved", LatentStore(tiny.clips).model) as writer:
        writer.add("new", make_input(16, 2, 4, 4), make_input(2, 64), source="n.mp4", caption="n")
    with pytest.raises(ValueError, match="clips was"):
        train(moved)


def _empty(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")


def _cut(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").write_text("{"),
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / ".metadata").unlink(),
        lambda path: (path / ".metadata").write_bytes(b"no pickle"),
        _empty,
        _cut,
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    tiny: Any, finished: Callable[..., Any], damage: Callable[[Path], None]
) -> None:
    settings = {"steps": 4, "checkpoints": {"every": 2}}
    config = tiny.config(**settings)
    shutil.copytree(finished(**settings).out, config.out)
    told, path = rows(config), config.out / "checkpoints" / "step-000004"
    damage(path)
    with pytest.raises(ValueError, match=r"step-000004.*: delete .*to go on from the checkpoint before it") as caught:
        train(config)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    shutil.rmtree(path)
    assert train(config).step == 4 and rows(config) == told


def test_a_folder_without_state_is_none(tiny: Any) -> None:
    config = tiny.config(steps=2, checkpoints={"every": 1})
    train(config)
    shutil.copytree(config.out / "checkpoints" / "step-000002", config.out / "checkpoints" / "step-000009.part")
    (config.out / "checkpoints" / "step-000002" / "state.json").unlink()
    assert begin(config).step == 1
    train(config)
    assert saved(config) == ["step-000001", "step-000002"], "what a kill left is swept up"


def _full_disk(*args: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "file")


@pytest.mark.parametrize("place", ["pusa_fast.training.saved.save", "os.fsync", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_what_was_there(
    tiny: Any, finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = {"checkpoints": {"every": 2}}
    whole, config = finished(**settings), tiny.config("full", **settings)
    plain, calls = Trainer._save, []

    def fails(self: Trainer, loss: float | None) -> None:
        if self.step != 4 or calls:
            return plain(self, loss)
        calls.append(self.step)
        with monkeypatch.context() as patch:
            patch.setattr(place, _full_disk)
            plain(self, loss)

    monkeypatch.setattr(Trainer, "_save", fails)
    before = threading.active_count()
    with pytest.raises(
        OSError,
        match=r"no checkpoint of step 4 \(the last one is .*step-000002\), for the disk is full: make room, and start",
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value) and threading.active_count() == before
    error: BaseException | None = caught.value
    chain = []
    while error is not None and len(chain) < 50:
        chain.append(error)
        error = error.__cause__
    assert len(chain) < 50, "the chain of causes is a ring"
    assert saved(config) == ["step-000002"]
    assert begin(config).step == 2
    train(config)
    assert rows(config) == rows(whole) and same(weights(config), weights(whole))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, as it does on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_system_refuses_to_write_a_checkpoint(tiny: Any) -> None:
    """torch's writer hides what the system said behind an error of its own."""
    config = tiny.config(
        steps=2, lora={"rank": 1024}, checkpoints={"every": 1}
    )  # each matrix is larger than what may be written
    begun = begin(config)
    begun._save(None)
    begun.step = 1
    with (
        files_of_at_most(100_000),
        pytest.raises(
            OSError,
            match=r"no checkpoint of step 1 \(the last one is .*step-000000\), "
            r"for a file may not be as large as this here: raise ulimit -f",
        ),
    ):
        begun._save(None)
    assert saved(config) == ["step-000000"]


def test_the_system_refuses_to_write_weights(tiny: Any, tmp_path: Path) -> None:
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(
            tmp_path / "x.safetensors", {"a": torch.zeros(10_000)}, load_dit(tiny.dit, device="meta").config
        )
    assert (
        caught.value.errno == errno.EFBIG
        and not list(tmp_path.glob("*.safetensors*"))
        and not list(tmp_path.glob(".*"))
    )


def test_two_runs_in_one_folder(tiny: Any) -> None:
    config = tiny.config(steps=1)
    config.out.mkdir(parents=True)
    with alone(config.out), pytest.raises(ValueError, match="run is being written by another run: wait for it"):
        train(config)
    assert not list(config.out.iterdir())
    assert train(config).step == 1


def test_an_interrupt_while_saving_leaves_no_part(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pusa_fast.training.saved.save", interrupted)
    config = tiny.config(checkpoints={"every": 2})
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert saved(config) == [] and caught.value.__cause__ is not caught.value
