"""Runs and trains Pusa: Wan video transformers with one noise level per latent frame.

The public names load on first use: importing this package loads no triton, transformers, diffusers
or av and touches no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pusa_fast._lazy import lazy_names

if TYPE_CHECKING:
    from pusa_fast.config import DiTConfig, VAEConfig
    from pusa_fast.model.dit import WanDiT
    from pusa_fast.model.vae.model import WanVAE
    from pusa_fast.model.vae.tiling import Tiling
    from pusa_fast.pipeline import Pipeline
    from pusa_fast.request import Request
    from pusa_fast.sampling.task import Condition

__version__ = "0.1.0"  # the build reads this line

__all__ = ["Condition", "DiTConfig", "Pipeline", "Request", "Tiling", "VAEConfig", "WanDiT", "WanVAE", "__version__"]

_HOME = {
    "Condition": "pusa_fast.sampling.task",
    "DiTConfig": "pusa_fast.config",
    "Pipeline": "pusa_fast.pipeline",
    "Request": "pusa_fast.request",
    "Tiling": "pusa_fast.model.vae.tiling",
    "VAEConfig": "pusa_fast.config",
    "WanDiT": "pusa_fast.model.dit",
    "WanVAE": "pusa_fast.model.vae.model",
}


__getattr__, __dir__ = lazy_names(__name__, _HOME)
