"""The causal video VAE: streamed, whole or in tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pusa_fast._lazy import lazy_names

if TYPE_CHECKING:
    from pusa_fast.model.vae.model import WanVAE as WanVAE
    from pusa_fast.model.vae.tiling import Tiling as Tiling

__all__ = ["Tiling", "WanVAE"]

_HOME = {"Tiling": "pusa_fast.model.vae.tiling", "WanVAE": "pusa_fast.model.vae.model"}
__getattr__, __dir__ = lazy_names(__name__, _HOME)
