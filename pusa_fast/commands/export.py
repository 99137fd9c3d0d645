"""`pusa-fast export`: a LoRA in another style, from a run's newest checkpoint or from a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import typer

from pusa_fast.training import adapters
from pusa_fast.training.config import load_config
from pusa_fast.training.parallel import World
from pusa_fast.training.saved import Checkpoints

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(source: str, out: str, style: str, dtype: str, overwrite: bool) -> None:
    """Raises ValueError and OSError for what cannot be read, converted or written."""
    target = Path(out)
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {out}: a LoRA is written as .safetensors: name it so")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give --overwrite to replace it, or another --out")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the folder {target.parent} does not exist: create it first")
    updates = _of_run(Path(source)) if (Path(source) / "config.yaml").is_file() else adapters.read_updates(source)
    adapters.write_lora(target, updates, style, _DTYPES[dtype])
    typer.echo(f"wrote {os.path.relpath(target)} ({style})")


def _of_run(folder: Path) -> adapters.Updates:
    """What a run's newest checkpoint holds, averaged where it was averaging. Neither model nor clips are needed."""
    config = load_config(folder / "config.yaml")
    if config.lora is None:
        raise ValueError(f"{folder} trained all weights, not a LoRA: load its dit.safetensors")
    saved = Checkpoints(folder, {}, 1, World(torch.device("cpu")))
    scale = 1.0 if config.lora.alpha is None else config.lora.alpha / config.lora.rank
    return adapters.saved_updates(saved.read("average") or saved.read("model"), scale)
