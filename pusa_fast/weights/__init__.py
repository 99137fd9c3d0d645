"""Reading and writing weights: checkpoints of every layout, LoRAs of every key style."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pusa_fast._lazy import lazy_names

if TYPE_CHECKING:
    from pusa_fast.weights.checkpoint import load_dit as load_dit
    from pusa_fast.weights.checkpoint import load_text_encoder_state as load_text_encoder_state
    from pusa_fast.weights.checkpoint import load_vae as load_vae
    from pusa_fast.weights.lora import apply_lora as apply_lora
    from pusa_fast.weights.lora import read_lora as read_lora

__all__ = ["apply_lora", "load_dit", "load_text_encoder_state", "load_vae", "read_lora"]


_HOME = {
    **dict.fromkeys(("apply_lora", "read_lora"), "pusa_fast.weights.lora"),
    **dict.fromkeys(("load_dit", "load_text_encoder_state", "load_vae"), "pusa_fast.weights.checkpoint"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOME)
