"""The reference's prepared clips, `<file>.tensors.pth`: {"latents": [C,F,h,w], "prompt_emb": {"context": [1,L,D]}, "image_emb"}.

Its text is padded with zero rows, which are left out here. Source: PusaV1/examples/pusavideo/train_wan_pusa.py, data_process.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What torch.load raises for a file that is none of its own, truncated or damaged.
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, pickle.UnpicklingError, struct.error,
)  # fmt: skip


def trimmed(rows: Tensor) -> Tensor:
    """[L, D] without the zero rows at its end."""
    filled = rows.ne(0).any(dim=1).nonzero()
    return rows[: int(filled[-1]) + 1 if len(filled) else 0]


def read_tensors(path: Path, channels: int, width: int, text_len: int) -> tuple[Tensor, Tensor]:
    """(latents [channels, F, h, w], text [L, width]), L from 1 to `text_len`. Raises ValueError where the file holds others."""
    latents, context = _load(path)
    if (
        latents.ndim != 4
        or latents.shape[0] != channels
        or not latents.numel()
        or latents.shape[2] % 2
        or latents.shape[3] % 2
    ):
        raise ValueError(
            f"{path} holds latents {list(latents.shape)}, the model needs [{channels}, F, h, w] of even h and w: give --ignore-tensors"
        )
    rows = context[0] if context.ndim == 3 and context.shape[0] == 1 else context
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(
            f"{path} holds text {list(context.shape)}, the model needs [1, L, {width}]: give --ignore-tensors"
        )
    rows = trimmed(rows)
    if not 1 <= len(rows) <= text_len:
        raise ValueError(
            f"{path} holds {len(rows)} rows of text, the model reads 1 to {text_len}: give --ignore-tensors"
        )
    return latents, rows


def text_width(path: Path) -> int | None:
    """Width of the text in a file, None where it cannot be read."""
    try:
        return int(_load(path)[1].shape[-1])
    except (ValueError, IndexError):
        return None


def _load(path: Path) -> tuple[Tensor, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be loaded ({reason[:120]}): restore it, or give --ignore-tensors") from None
    text = found.get("prompt_emb") if isinstance(found, Mapping) else None
    context = text.get("context") if isinstance(text, Mapping) else None
    latents = found.get("latents") if isinstance(found, Mapping) else None
    for tensor in (latents, context):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(
                f'{path} holds no "latents" with "prompt_emb" and its "context": restore it, or give --ignore-tensors'
            )
    assert isinstance(latents, Tensor) and isinstance(context, Tensor)
    return latents, context
