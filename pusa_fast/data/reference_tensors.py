"""The reference's prepared clips: `<file>.tensors.pth`.

{"latents": [C,F,h,w], "prompt_emb": {"context": [1,L,D]}, "image_emb"}, the text padded with zero
rows, which are left out here. Source: PusaV1/examples/pusavideo/train_wan_pusa.py, data_process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pusa_fast.config import Geometry
from pusa_fast.weights.files import load_pickle


def trimmed(rows: Tensor) -> Tensor:
    """[L, D] without the zero rows at its end."""
    filled = rows.ne(0).any(dim=1).nonzero()
    return rows[: int(filled[-1]) + 1 if len(filled) else 0]


def read_tensors(path: Path, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(latents [C, F, h, w], text [L, D]), L from 1 to `geometry.text_len`.

    Raises ValueError for a file that cannot be read, or whose tensors the model cannot take.
    """
    latents, context = _load(path)
    channels, (_, ph, pw) = geometry.channels, geometry.patch
    fits = latents.ndim == 4 and latents.shape[0] == channels and latents.numel() > 0
    if not fits or latents.shape[2] % ph or latents.shape[3] % pw:
        needed = f"[{channels}, F, h, w] with h and w multiples of the patch {ph}x{pw}"
        raise ValueError(f"{path} holds latents {list(latents.shape)}, the model needs {needed}: give --ignore-tensors")
    rows = context[0] if context.ndim == 3 and context.shape[0] == 1 else context
    if rows.ndim != 2 or rows.shape[1] != geometry.text_dim:
        needed = f"[1, L, {geometry.text_dim}]"
        raise ValueError(f"{path} holds text {list(context.shape)}, the model needs {needed}: give --ignore-tensors")
    rows = trimmed(rows)
    if not 1 <= len(rows) <= geometry.text_len:
        read = f"the model reads 1 to {geometry.text_len}"
        raise ValueError(f"{path} holds {len(rows)} rows of text, {read}: give --ignore-tensors")
    return latents, rows


def _load(path: Path) -> tuple[Tensor, Tensor]:
    try:
        found = load_pickle(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")[:120]
        raise ValueError(f"{path} cannot be loaded ({reason}): restore it, or give --ignore-tensors") from None
    tables = found if isinstance(found, Mapping) else {}
    text = tables.get("prompt_emb")
    latents, context = tables.get("latents"), text.get("context") if isinstance(text, Mapping) else None
    for tensor in (latents, context):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(
                f'{path} holds no "latents" with "prompt_emb" and its "context": restore it, or give --ignore-tensors'
            )
    assert isinstance(latents, Tensor) and isinstance(context, Tensor)
    return latents, context
