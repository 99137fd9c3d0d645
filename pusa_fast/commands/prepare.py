"""`pusa-fast prepare`: clips and captions into a folder of latents, for training."""

from __future__ import annotations

import os

import typer

from pusa_fast.commands.progress import bars
from pusa_fast.options import PrepareOptions, declared


def run(options: PrepareOptions) -> None:
    """Prepare the clips. Raises ValueError, OSError or torch.OutOfMemoryError; complete shards
    stay."""
    from pusa_fast.data.prepare import REPORT, prepare
    from pusa_fast.model.vae.tiling import TILINGS

    given = {option.key: getattr(options, option.name) for option in declared(PrepareOptions).values()}
    given["tiling"] = TILINGS[options.tiling or "whole"]
    chosen = {name: value for name, value in given.items() if value is not None}
    with bars() as progress:
        report = prepare(**chosen, progress=progress)
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    sizes = ", ".join(f"{count} of {bucket}" for bucket, count in report.buckets.items())
    counts = f"{report.clips} clips in {os.path.relpath(options.out)} ({report.new} new): {sizes}"
    for count, what in ((report.duplicates, "duplicates left out"), (len(report.bad), f"bad, see {REPORT}")):
        counts += f"; {count} {what}" if count else ""
    typer.echo(counts, err=True)
