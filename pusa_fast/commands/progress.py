"""Progress bars on stderr; none where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """`update(what, done, total)`: a bar for each `what`, made at its first update."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    made: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def update(what: str, done: int, total: int) -> None:
            if what not in made:
                made[what] = progress.add_task(what, total=total)
            progress.update(made[what], completed=done)

        yield update
