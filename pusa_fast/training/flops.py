"""Operations of a training step (docs/performance.md), for utilisation and `train --plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pusa_fast.config import DiTConfig

if TYPE_CHECKING:
    from pusa_fast.training.config import LoRA, TrainConfig

# Matmuls of a block: widths in and out (D, or I of the feed-forward), rows (L tokens, T text).
_PROJECTIONS = {
    **dict.fromkeys((f"self_attn.{x}" for x in "qkvo"), ("D", "D", "L")),
    **dict.fromkeys(("cross_attn.q", "cross_attn.o"), ("D", "D", "L")),
    **dict.fromkeys(("cross_attn.k", "cross_attn.v"), ("D", "D", "T")),
    "ffn.0": ("D", "I", "L"),
    "ffn.2": ("I", "D", "L"),
}  # fmt: skip


def tokens(config: DiTConfig, latents: Sequence[int], text: int) -> int:
    """Tokens of latents [B, C, F, h, w]."""
    B, _, F, h, w = latents
    return B * F * (h // config.patch_size[1]) * (w // config.patch_size[2])


def products(config: DiTConfig, latents: Sequence[int], text: int) -> float:
    """FLOPs of the blocks' matmuls in one forward, without attention."""
    sizes = _sizes(config, latents, text)
    return config.num_layers * sum(2.0 * sizes[a] * sizes[b] * sizes[rows] for a, b, rows in _PROJECTIONS.values())


def _sizes(config: DiTConfig, latents: Sequence[int], text: int) -> dict[str, int]:
    return {"D": config.dim, "I": config.ffn_dim, "L": tokens(config, latents, text), "T": latents[0] * text}


def attention(config: DiTConfig, latents: Sequence[int], text: int) -> float:
    """FLOPs of attention in one forward, over itself and over the text."""
    own = tokens(config, latents, text)
    return config.num_layers * 4.0 * config.dim * own * (own / latents[0] + text)


def low_rank(config: DiTConfig, latents: Sequence[int], text: int, lora: LoRA) -> float:
    """FLOPs of the adapters in one forward."""
    sizes = _sizes(config, latents, text)
    hit = [shape for name, shape in _PROJECTIONS.items() if any(f".{name}".endswith(f".{t}") for t in lora.targets)]
    return config.num_layers * sum(2.0 * lora.rank * (sizes[a] + sizes[b]) * sizes[rows] for a, b, rows in hit)


def training_step(config: TrainConfig) -> Callable[[DiTConfig, Sequence[int], int], float]:
    """FLOPs that a step of `config` on one batch has to compute: repeated work does not count.

    A frozen matmul runs forward and for its input's gradient, one that trains also for its
    weight's. Attention's backward pass is twice its forward.
    """

    def step(dit: DiTConfig, latents: Sequence[int], text: int) -> float:
        frozen = 3.0 if config.lora is None else 2.0
        extra = 0.0 if config.lora is None else 3.0 * low_rank(dit, latents, text, config.lora)
        return frozen * products(dit, latents, text) + 3.0 * attention(dit, latents, text) + extra

    return step
