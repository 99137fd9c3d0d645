"""One measurement, from its options to its result: checks them, shows progress, ends with one JSON.

stdout carries only that document; progress and everything that libraries print go to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.card import card
from bench.registry import DEFAULT_DTYPES, DTYPES
from pusa_fast.ops.registry import ONEDNN_BF16


@dataclass(frozen=True)
class Options:
    """Of any measurement, which uses those it needs. Empty tuples and None: its own default."""

    device: str | None = None
    quick: bool = False
    out: str | None = None
    seconds: float | None = None  # of the whole run: nothing new starts after that
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    model: str | None = None
    random_weights: bool = False
    size: str | None = None
    steps: int | None = None
    precision: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Options:
        """From a JSON object of fields. Raises ValueError for an unknown one."""
        found = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or not found.keys() <= known:
            raise ValueError(f"options must be a JSON object of {', '.join(sorted(known))}, got {text}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


class Recorder:
    """Progress and intermediate results of a run, which starts nothing new after `deadline`."""

    def __init__(self, kind: str, options: Options, device: torch.device) -> None:
        self.kind, self.out, self.device = kind, options.out, device
        self.console = _console()
        self.deadline = time.monotonic() + (options.seconds or float("inf"))
        self.result: dict[str, Any] = {"bench": kind, "card": card(device), "quick": options.quick, "complete": False}
        self._started = False
        self._status = self.console.status(f"bench {kind}") if self.console.is_terminal else None

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def note(self, text: str) -> None:
        """A line on stderr."""
        self.console.print(text, markup=False, soft_wrap=True)

    def working_on(self, text: str) -> None:
        """Show the current activity: a spinner where stderr is a terminal, else a line."""
        if not self._started and self.device.type == "cpu":
            self.note("On the CPU, at small sizes: these figures say nothing about a GPU.")
        self._started = True
        if self._status is None:
            self.note(f"  {text}")
        else:
            self._status.update(text)
            self._status.start()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self._status is not None:
            self._status.stop()
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def save(self, **parts: Any) -> None:
        """Add parts to the result and write it, so that a killed run keeps what it has measured."""
        self.result.update(parts)
        if self.out is not None:
            write_json(self.out, self.result)

    def stop(self) -> None:
        if self._status is not None:
            self._status.stop()


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=120)


def resolve_device(name: str | None) -> torch.device:
    """The device asked for; None: a GPU where there is one. Raises ValueError if it is missing."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not available: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; --device cpu measures small sizes on the CPU")
    return torch.device(name)


def choose(kind: str, wanted: Sequence[str], known: Sequence[str], default: Sequence[str]) -> list[str]:
    """The names asked for, else the default. ValueError for an unknown name lists the known."""
    for name in wanted:
        if name not in known:
            raise ValueError(f"--{kind} {name} does not exist: choose from {', '.join(known)}")
    return list(wanted or default)


def model_dtypes(options: Options, recorder: Recorder) -> list[str]:
    """The dtypes asked for, or all that this CPU has in hardware: bf16 in software takes hours."""
    default = [name for name in DEFAULT_DTYPES["cpu"] if ONEDNN_BF16 or name != "bf16"]
    if not options.dtypes and len(default) < len(DEFAULT_DTYPES["cpu"]):
        recorder.note("bf16 left out: this CPU multiplies it in software; --dtype bf16 measures that")
    return choose("dtype", options.dtypes, list(DTYPES), default)


def _module(name: str) -> Callable[[Options, Recorder], None]:
    """The `run` of a module that is imported only when called."""
    return lambda options, recorder: importlib.import_module(name).run(options, recorder)


def _numerics(options: Options, recorder: Recorder) -> None:
    from bench import run_numerics

    recorder.save(**run_numerics.run(recorder.device, clips=2 if options.quick else 16))


# Each measurement by name; it writes into the recorder's result.
RUNS: Mapping[str, Callable[[Options, Recorder], None]] = {
    "ops": _module("bench.run_ops"),
    "attention": _module("bench.run_attention"),
    "dit": _module("bench.run_dit"),
    "vae": _module("bench.run_vae"),
    "e2e": _module("bench.run_e2e"),
    "train": _module("bench.run_train"),
    "numerics": _numerics,
}


def execute(kind: str, options: Options) -> dict[str, Any]:
    """Run one measurement; its result goes to `options.out` too. ValueError: unusable options."""
    if kind not in RUNS:
        raise ValueError(f"bench {kind} does not exist: choose from {', '.join(RUNS)}")
    device = resolve_device(options.device)
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: its folder does not exist")
    recorder = Recorder(kind, options, device)
    try:
        RUNS[kind](options, recorder)
    finally:
        recorder.stop()
    recorder.save(complete=True)
    return recorder.result


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send everything written to stdout to stderr, from C libraries and child processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_json(result: Mapping[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(result, allow_nan=False), flush=True)


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary one in its folder, then renamed."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
