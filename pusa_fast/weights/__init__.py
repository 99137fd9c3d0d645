"""Reading and writing weights: checkpoints of every layout, LoRAs of every key style."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pusa_fast.weights.checkpoint import load_dit as load_dit
    from pusa_fast.weights.checkpoint import load_text_encoder_state as load_text_encoder_state
    from pusa_fast.weights.checkpoint import load_vae as load_vae
    from pusa_fast.weights.lora import apply_lora as apply_lora
    from pusa_fast.weights.lora import read_lora as read_lora

__all__ = ["apply_lora", "load_dit", "load_text_encoder_state", "load_vae", "read_lora"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'lora' if name.endswith('lora') else 'checkpoint'}"), name)
