"""`pusa-fast train`: runs a training from settings, or predicts what it will take."""

from __future__ import annotations

import os
import signal

import typer

from pusa_fast.options import TrainOptions
from pusa_fast.training.config import load_config


def run(options: TrainOptions) -> None:
    """Raises ValueError, OSError, FloatingPointError; keeps checkpoints. SIGINT: exits with 130."""
    if options.config is None and not options.set_:
        raise ValueError("give a CONFIG.YAML, or at least --set data.path=PREPARED --set out=RUN")
    config = load_config(options.config, options.set_ or [])
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    if options.plan:
        from pusa_fast.training.plan import plan_run

        typer.echo(plan_run(config, options.processes or int(os.environ.get("WORLD_SIZE", "1"))).text())
        return
    from pusa_fast.training.trainer import train

    done = train(config)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if done.weights is not None:
        typer.echo(f"wrote {os.path.relpath(done.weights)}")
        return
    where = f"after step {done.step} of {config.steps}, with a checkpoint" if done.step else "before the first step"
    typer.echo(f"stopped {where}: run the same command again to resume")
    if done.signal == signal.SIGINT:
        raise typer.Exit(130)
