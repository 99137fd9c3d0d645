"""`pusa-fast export`: a LoRA in another style, from a run's newest checkpoint or from a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import typer

from pusa_fast.training import adapters
from pusa_fast.training.config import Validation, load_config

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
    adapters.write_lora(target, adapters.read_updates(_lora(Path(source))), style, _DTYPES[dtype])
    typer.echo(f"wrote {os.path.relpath(target)} ({style})")


def _lora(source: Path) -> Path:
    """The LoRA file itself; of a run's folder, what its newest checkpoint holds."""
    if not (source / "config.yaml").is_file():
        return source
    from pusa_fast.training.trainer import export_run

    here = {"out": source, "device": None, "attention": "auto", "parallel": "auto", "validation": Validation()}
    config = load_config(source / "config.yaml").model_copy(update=here)
    if config.lora is None:
        raise ValueError(f"{source} trained all weights, not a LoRA: load its dit.safetensors")
    weights = export_run(config).weights
    assert weights is not None
    return weights
