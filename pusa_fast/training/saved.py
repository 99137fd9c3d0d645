"""A run's checkpoints: complete folders, the last few and the best, for any number of processes.

    checkpoints/step-000100/   files of torch.distributed.checkpoint (what trains, optimisers,
                               averages), state.json

A folder is written as `step-000100.part` and renamed. torch.distributed.checkpoint keeps its table
of contents as a pickle: go on only from folders of your own. To pass weights on, use
`pusa-fast export`.
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
from types import MappingProxyType
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
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_HERE = World(torch.device("cpu"))  # reads alone
_NO_ROOM = {
    errno.ENOSPC: "the disk is full: make room", errno.EDQUOT: "the disk's quota is used up: make room",
    errno.EFBIG: "a file may not be as large as this here: raise ulimit -f, or use another file system",
}  # fmt: skip


class Checkpoints:
    """The checkpoints of the run in `out`. One of another `identity` is refused."""

    def __init__(self, out: Path, identity: Mapping[str, Any] = _NOTHING, keep: int = 1, world: World = _HERE) -> None:
        self.folder, self.identity, self.keep, self.world = out / FOLDER, dict(identity), keep, world

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        found = (_NAME.match(path.name) for path in self.folder.glob("step-*") if (path / STATE).is_file())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> int | None:
        """The last step, the same for all processes: on network disks they may see others."""
        found: int | None = self.world.gather(max(self.steps(), default=None))[0]
        return found

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def best(self) -> dict[str, Any] | None:
        """{"step", "loss"} of the lowest validation loss; None without its checkpoint."""
        path = self.folder / BEST
        if not path.is_file():
            return None
        try:
            found = dict(json.loads(path.read_text()))
            return found if (self.path(int(found["step"])) / STATE).is_file() and math.isfinite(found["loss"]) else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, and the best is searched for again") from None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        average: Average | None,
        more: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Write a checkpoint of all processes' parts, then delete those that need not stay.

        Raises OSError with the mend where the disk is full; older checkpoints stay.
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
        """Load the newest checkpoint into these and return its state; None without one.

        Raises ValueError where it is of another configuration, naming the differences, or cannot
        be read.
        """
        if (newest := self.newest()) is None:
            return None
        path = self.path(newest)
        mend = "to go on from the checkpoint before it"
        try:
            about = dict(json.loads((path / STATE).read_text()))
            then, _ = dict(about["identity"]), int(about["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / STATE} is damaged ({error!r}): delete {path} {mend}") from None
        if differing := "; ".join(_differences(then, self.identity)[:4]):
            other = f"{path} is of another configuration: {differing}"
            raise ValueError(f"{other}. Give another out, or go back to those settings")
        state = _state(model, optimizers, average)
        with _reading(path, mend), _alone(self.world):
            load(state, checkpoint_id=path, no_dist=self.world.size == 1)
        set_state_dict(
            model, list(optimizers), model_state_dict=state["model"], optim_state_dict=state["optim"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        return about

    def find(self, which: str | None) -> int:
        """The step of a checkpoint: a number, "best" by validation loss, or None, the newest.

        Raises ValueError.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"{self.folder.parent} holds no checkpoint: train first")
        if which == "best":
            if (best := self.best()) is None:
                raise ValueError(f"{self.folder.parent} has no best checkpoint: data.validation_clips makes one")
            return int(best["step"])
        step = steps[-1] if which is None else int(which) if which.isdecimal() else None
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise ValueError(f"{self.folder.parent} has no checkpoint {which}: choose one of {known}, or best")
        return step

    def read(self, step: int, part: str) -> dict[str, Tensor]:
        """Tensors of a checkpoint by parameter name, on the CPU. `part`: "model" or "average".

        Empty where it has no such part. Raises ValueError where it cannot be read.
        """
        path = self.path(step)
        with _reading(path, "to read the one before it"), _alone(_HERE):
            entries = FileSystemReader(path).read_metadata().state_dict_metadata
            tensors = {
                name.removeprefix(f"{part}."): torch.empty(entry.size, dtype=entry.properties.dtype)
                for name, entry in entries.items()
                if name.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
            }
            if tensors:
                load({part: tensors}, checkpoint_id=path, no_dist=True)
        return tensors

    def _forget(self) -> None:
        """Keep the last `keep` and the best."""
        steps = self.steps()
        best = self.best()
        kept = {*steps[-self.keep :], best["step"] if best else -1}
        for step in steps:
            if step not in kept:
                (self.path(step) / STATE).unlink(missing_ok=True)  # without this it is not a checkpoint
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed runs left unfinished."""
        for path in self.folder.glob("*.part"):
            shutil.rmtree(path, ignore_errors=True)

    def _lost(self, step: int, why: str) -> str:
        steps = self.steps()
        last = f"the last one is {self.path(steps[-1])}" if steps else "there is none yet"
        return f"no checkpoint of step {step} ({last}), for {why}, and start the same command again"


def _unwrapped(error: BaseException) -> BaseException:
    """The error in a process; torch.distributed.checkpoint says only that there was one."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def _no_room(error: BaseException) -> str | None:
    """Why a write failed, and what helps; None for other errors.

    torch's writer raises its own error over the system's. From other processes comes only its text.
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
def _reading(path: Path, mend: str) -> Iterator[None]:
    """ValueError in place of the many errors that torch raises for damaged files."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _unwrapped(error)
        if not isinstance(cause, Exception):
            raise
        why = " ".join(repr(cause).split())[:200]
        raise ValueError(f"{path} cannot be read ({why}): delete it {mend}") from error


@contextmanager
def _alone(world: World) -> Iterator[None]:
    """Without the warning that a single process is alone."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], average: Average | None) -> dict[str, Any]:
    """What is saved; also the tensors that loading fills. Averages load into their own tensors."""
    found, optim = get_state_dict(model, list(optimizers), options=_OPTIONS)
    return {"model": found, "optim": optim, **({"average": average.tensors} if average else {})}


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """Settings that differ, by dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for k in keys for d in _differences(then.get(k), now.get(k), f"{name}.{k}".strip("."))]
    return [] if then == now else [f"{name} was {then!r}, is {now!r}"]
