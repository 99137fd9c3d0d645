"""`pusa-fast export`: weights for other tools, from a run's checkpoint or a LoRA file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import typer
from torch import Tensor

from pusa_fast.device import DTYPES
from pusa_fast.options import ExportOptions
from pusa_fast.training import adapters
from pusa_fast.training.config import load_config
from pusa_fast.training.parallel import World
from pusa_fast.training.saved import Checkpoints
from pusa_fast.weights import checkpoint, keymap, load_dit
from pusa_fast.weights.pretrained import find_model


def run(options: ExportOptions) -> None:
    """Raises ValueError and OSError for what cannot be read, converted or written."""
    source, out, style, step = options.source, options.out, options.style, options.step
    target, kind = Path(out), DTYPES[options.dtype or "bfloat16"]
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {out}: weights are written as .safetensors: name it so")
    if target.exists() and not options.overwrite:
        raise FileExistsError(f"{out} exists: give --overwrite to replace it, or another --out")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {target.parent} does not exist: create it first")
    folder = Path(source)
    if not (folder / "config.yaml").is_file():
        if step is not None:
            raise ValueError(f"--step {step} names a run's checkpoint, but {source} is not a run's folder")
        adapters.write_lora(target, adapters.read_updates(source), style or "released", kind)
        typer.echo(f"wrote {os.path.relpath(target)} ({style or 'released'})")
        return
    config = load_config(folder / "config.yaml")
    if config.lora is not None:
        number, trained = _trained(folder, step)
        scale = 1.0 if config.lora.alpha is None else config.lora.alpha / config.lora.rank
        adapters.write_lora(target, adapters.saved_updates(trained, scale), style or "released", kind)
        typer.echo(f"wrote {os.path.relpath(target)} ({style or 'released'}, step {number})")
        return
    if style is not None:
        raise ValueError(f"--style {style} is for LoRAs, and {folder} trained all weights: leave it out")
    # The file names its configuration: that of the model the run started from.
    about = load_dit(config.dit or find_model(config.model).dit, device="meta").config
    number, trained = _trained(folder, step)
    checkpoint.save(target, {name: t.to(kind) for name, t in keymap.unpack(trained).items()}, about)
    typer.echo(f"wrote {os.path.relpath(target)} (the transformer, step {number})")


def _trained(folder: Path, which: str | None) -> tuple[int, dict[str, Tensor]]:
    """A checkpoint's weights, averaged if the run averages; needs neither model nor clips."""
    saved = Checkpoints(folder, {}, 1, World(torch.device("cpu")))
    step = saved.find(which)
    return step, saved.read(step, "average") or saved.read(step, "model")
