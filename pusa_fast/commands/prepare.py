"""`pusa-fast prepare`: clips and captions into a folder of latents, for training."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@dataclass(frozen=True)
class Options:
    """The options as typed; None where not given."""

    source: str
    out: str
    model: str | None = None
    bucket: list[str] | None = None
    fps: float | None = None
    clips_per_video: int | None = None
    start: str | None = None
    seed: int | None = None
    fit: str | None = None
    device: str | None = None
    dtype: str | None = None
    tiling: str | None = None
    shard_clips: int | None = None
    ignore_tensors: bool = False
    add: bool = False
    strict: bool = False


def run(options: Options) -> None:
    """Prepare the clips. Raises ValueError, OSError or torch.OutOfMemoryError; complete shards stay."""
    from pusa_fast.commands.job import TILINGS
    from pusa_fast.data.prepare import REPORT, prepare

    given: dict[str, Any] = {
        "model": options.model, "buckets": options.bucket, "fps": options.fps, "clips_per_video": options.clips_per_video,
        "start": options.start, "seed": options.seed, "fit": options.fit, "device": options.device, "dtype": options.dtype,
        "tiling": TILINGS[options.tiling or "whole"], "shard_clips": options.shard_clips,
    }  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    with _as_typed(), _progress() as progress:
        report = prepare(
            options.source, options.out, ignore_tensors=options.ignore_tensors, add=options.add, strict=options.strict,
            progress=progress, **chosen,
        )  # fmt: skip
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    sizes = ", ".join(f"{count} of {bucket}" for bucket, count in report.buckets.items())
    counts = f"{report.clips} clips in {os.path.relpath(options.out)} ({report.new} new): {sizes}"
    for count, what in ((report.duplicates, "duplicates left out"), (len(report.bad), f"bad, see {REPORT}")):
        counts += f"; {count} {what}" if count else ""
    typer.echo(counts, err=True)


@contextmanager
def _as_typed() -> Iterator[None]:
    """Errors about an argument in the words of the command line."""
    try:
        yield
    except ValueError as error:
        typed = re.sub(
            r"^(bucket|clips_per_video|shard_clips|seed|fps)\b", lambda m: "--" + m[1].replace("_", "-"), str(error)
        )
        raise ValueError(typed) from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Moves a bar for each stage on stderr; no bar where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def update(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        yield update
