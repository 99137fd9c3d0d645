"""A run's checkpoints: complete folders or none, the last few and the best, readable by any number of processes.

    checkpoints/step-000100/   torch.distributed.checkpoint's files (parameters that train, optimisers, averages), state.json

A folder is written as `step-000100.part` and renamed. torch.distributed.checkpoint keeps its table of contents as a pickle: go
on only from folders of your own; what is passed around is what `pusa-fast export` writes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pusa_fast.data.durable import write_text
from pusa_fast.training.optim import Average
from pusa_fast.training.parallel import World

STATE, FOLDER, BEST = "state.json", "checkpoints", "best.json"
_NAME = re.compile(r"step-(\d{6,})$")
_OPTIONS = StateDictOptions(ignore_frozen_params=True)
_NO_ROOM = {
    errno.ENOSPC: "the disk is full: make room", errno.EDQUOT: "the disk's quota is used up: make room",
    errno.EFBIG: "a file may not be as large as this here: raise ulimit -f, or take another file system",
}  # fmt: skip


class Checkpoints:
    """Those of the run in `out`. `identity`: what they depend on; one of another identity is refused."""

    def __init__(self, out: Path, identity: Mapping[str, Any], keep: int, world: World) -> None:
        self.folder, self.identity, self.keep, self.world = out / FOLDER, dict(identity), keep, world

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        found = (_NAME.match(path.name) for path in self.folder.glob("step-*") if (path / STATE).is_file())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> int | None:
        """The last one's step, the same for all processes: on a network disk they may see different ones."""
        found: int | None = self.world.gather(max(self.steps(), default=None))[0]
        return found

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def best(self) -> dict[str, Any] | None:
        """{"step", "loss"} of the lowest validation loss so far; None where its checkpoint was deleted."""
        path = self.folder / BEST
        if not path.is_file():
            return None
        try:
            found = dict(json.loads(path.read_text()))
            return found if (self.path(int(found["step"])) / STATE).is_file() and math.isfinite(found["loss"]) else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, the best is then sought anew") from None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        average: Average | None,
        more: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Write a checkpoint of all processes' parts, then forget those that need not stay.

        Raises OSError with the mend where the disk is full; what was there before stays.
        """
        final = self.path(step)
        part = final.with_name(final.name + ".part")
        try:
            if self.world.is_first:
                self._sweep()
                part.mkdir(parents=True)
            self.world.barrier()
            with _alone(self.world):
                save(_state(model, optimizers, average), checkpoint_id=part, no_dist=self.world.size == 1)
            if self.world.is_first:
                with (part / STATE).open("w") as file:
                    file.write(json.dumps({"step": step, "identity": self.identity, **more}, indent=1))
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(final, ignore_errors=True)
                os.replace(part, final)
                if validation_loss is not None and validation_loss < (self.best() or {"loss": float("inf")})["loss"]:
                    write_text(self.folder / BEST, json.dumps({"step": step, "loss": validation_loss}))
                self._forget()
        except BaseException as error:
            cause = _unwrapped(error)
            full = _no_room(error)
            if self.world.is_first:
                shutil.rmtree(part, ignore_errors=True)
            if full is not None:
                raise OSError(self._lost(step, full)) from error
            if cause is not error and isinstance(cause, Exception):
                raise cause from None
            raise
        self.world.barrier()

    def restore(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average | None
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint into them and return its state; None where there is none.

        Raises ValueError where it is of another configuration, naming what differs, or cannot be read.
        """
        if (newest := self.newest()) is None:
            return None
        path = self.path(newest)
        try:
            about = dict(json.loads((path / STATE).read_text()))
            then, _ = dict(about["identity"]), int(about["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path / STATE} is damaged ({error!r}): delete {path} to go on from the checkpoint before it"
            ) from None
        if differing := _differences(then, self.identity):
            raise ValueError(
                f"{path} is of another configuration: {'; '.join(differing[:4])}. Give another out, or go back to those settings"
            )
        state = _state(model, optimizers, average)
        try:
            with _alone(self.world):
                load(state, checkpoint_id=path, no_dist=self.world.size == 1)
        except (
            Exception,
            CheckpointException,
        ) as error:  # torch raises many kinds for files that are not what they should be
            cause = _unwrapped(error)
            if not isinstance(cause, Exception):
                raise
            raise ValueError(
                f"{path} cannot be read ({' '.join(repr(cause).split())[:200]}): delete it to go on from the checkpoint before it"
            ) from error
        set_state_dict(
            model, list(optimizers), model_state_dict=state["model"], optim_state_dict=state["optim"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        return about

    def find(self, which: str | None) -> int:
        """The step of the checkpoint that `which` names: a number, "best" by validation loss, or None, the newest. Raises ValueError."""
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.folder.parent} holds no checkpoint: train first")
        if which == "best":
            if (best := self.best()) is None:
                raise ValueError(f"{self.folder.parent} has no best checkpoint: data.validation_clips makes one")
            return int(best["step"])
        step = steps[-1] if which is None else int(which) if which.isdecimal() else None
        if step not in steps:
            raise ValueError(
                f"{self.folder.parent} has no checkpoint {which}: choose one of {', '.join(map(str, steps))}, or best"
            )
        return step

    def read(self, step: int, part: str) -> dict[str, Tensor]:
        """Tensors of a checkpoint by parameter name, on the CPU, without a model. `part`: "model" or "average".

        Empty where it has no such part. Raises ValueError where it cannot be read.
        """
        path = self.path(step)
        try:
            entries = FileSystemReader(path).read_metadata().state_dict_metadata
            wanted = {name.removeprefix(f"{part}."): e for name, e in entries.items() if name.startswith(f"{part}.")}
            tensors = {
                name: torch.empty(e.size, dtype=e.properties.dtype)
                for name, e in wanted.items()
                if isinstance(e, TensorStorageMetadata)
            }
            if tensors:
                with _alone(World(torch.device("cpu"))):
                    load({part: tensors}, checkpoint_id=path, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise ValueError(
                f"{path} cannot be read ({' '.join(repr(_unwrapped(error)).split())[:200]}): delete it to read the one before it"
            ) from error
        return tensors

    def _forget(self) -> None:
        """Keep the last `keep` and the best."""
        steps = self.steps()
        best = self.best()
        kept = {*steps[-self.keep :], best["step"] if best else -1}
        for step in steps:
            if step not in kept:
                (self.path(step) / STATE).unlink(missing_ok=True)  # killed from here on, it is none
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed runs left half written."""
        for path in self.folder.glob("*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def _lost(self, step: int, why: str) -> str:
        steps = self.steps()
        last = f"the last one is {self.path(steps[-1])}" if steps else "there is none yet"
        return f"no checkpoint of step {step} ({last}), for {why}, and start the same command again"


def _unwrapped(error: BaseException) -> BaseException:
    """What happened in a process, where torch.distributed.checkpoint says only that something did."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def _no_room(error: BaseException) -> str | None:
    """Why a write failed, and what helps; None where something else did.

    torch's writer raises its own error over the system's; from another process comes the text of that alone.
    """
    cause: BaseException | None = _unwrapped(error)
    seen: list[BaseException] = []
    while cause is not None and cause not in seen:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return _NO_ROOM[cause.errno]
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(words in str(e) for e in seen for words in ("inline_container", "file write failed")):
        return "writing failed: see that the disk has room"
    return None


@contextmanager
def _alone(world: World) -> Iterator[None]:
    """Without the warning that a single process is alone."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average | None) -> dict[str, Any]:
    """What is saved; also the places that loading fills. Averages are loaded into their own tensors."""
    found, optim = get_state_dict(model, list(optimizers), options=_OPTIONS)
    return {"model": found, "optim": optim, **({"average": average.tensors} if average else {})}


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Settings that differ, by dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for k in keys for d in _differences(then.get(k), now.get(k), f"{name}.{k}".strip("."))]
    return [] if then == now else [f"{name} was {then!r}, is {now!r}"]
