"""Programs as forked processes: starting Python with torch and the trainer takes five seconds."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["torch._dynamo", "pusa_fast.data.prepare", "pusa_fast.training.trainer"]


def module(name: str, *words: str | Path) -> None:
    """What `python -m name words...` does."""
    sys.argv = [name, *map(str, words)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


class Program(ForkServerProcess):
    """Calls a function in a process with its own session, working directory and environment."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str], call: Callable[..., None], *words: Any):
        super().__init__(target=call, args=words, daemon=False)
        self._folder, self._environment = str(folder), environment
        self._outputs = [folder / f"{name}.{stream}" for stream in ("out", "err")]

    def run(self) -> None:
        os.setsid()
        os.chdir(self._folder)
        os.environ.update(self._environment)
        for number, path in enumerate(self._outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        torch.set_num_threads(1)
        super().run()

    def finish(self, timeout: float = 60) -> tuple[int, str, str]:
        """Waits for its end. Returns (exit code, stdout, stderr)."""
        self.join(timeout)
        out, err = (path.read_text() for path in self._outputs)
        assert self.exitcode is not None, f"still running after {timeout} s: {out}\n{err}"
        return self.exitcode, out, err
