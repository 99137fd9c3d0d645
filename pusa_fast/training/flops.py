"""How much a training step computes (docs/performance.md), for utilisation and for `train --plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pusa_fast.config import DiTConfig

if TYPE_CHECKING:
    from pusa_fast.training.config import LoRA, TrainConfig

# Of an adapted projection inside a block: how wide its input and output are, in widths (D) or feed-forward widths (I).
_PROJECTIONS = {
    **dict.fromkeys(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o"), ("D", "D", "L")),
    **dict.fromkeys(("cross_attn.k", "cross_attn.v"), ("D", "D", "T")),
    "ffn.0": ("D", "I", "L"),
    "ffn.2": ("I", "D", "L"),
}  # fmt: skip


def tokens(config: DiTConfig, latents: Sequence[int], text: int) -> int:
    """Tokens of latents [B, C, F, h, w]."""
    B, _, F, h, w = latents
    return B * F * (h // config.patch_size[1]) * (w // config.patch_size[2])


def products(config: DiTConfig, latents: Sequence[int], text: int) -> float:
    """FLOPs of the matrix products of one forward, without attention, embeddings and head."""
    sizes = {"D": config.dim, "I": config.ffn_dim, "L": tokens(config, latents, text), "T": latents[0] * text}
    return config.num_layers * sum(2.0 * sizes[a] * sizes[b] * sizes[rows] for a, b, rows in _PROJECTIONS.values())


def attention(config: DiTConfig, latents: Sequence[int], text: int) -> float:
    """FLOPs of attention of one forward, over itself and over the text."""
    own = tokens(config, latents, text)
    return config.num_layers * 4.0 * config.dim * own * (own / latents[0] + text)


def low_rank(config: DiTConfig, latents: Sequence[int], text: int, lora: LoRA) -> float:
    """FLOPs of the adapters of one forward."""
    sizes = {"D": config.dim, "I": config.ffn_dim, "L": tokens(config, latents, text), "T": latents[0] * text}
    hit = [
        shape for name, shape in _PROJECTIONS.items() if any(name == t or name.endswith(f".{t}") for t in lora.targets)
    ]
    return config.num_layers * sum(2.0 * lora.rank * (sizes[a] + sizes[b]) * sizes[rows] for a, b, rows in hit)


def training_step(config: TrainConfig) -> Callable[[DiTConfig, Sequence[int], int], float]:
    """FLOPs that a step of `config` on one batch has to compute: repeated work does not count.

    A frozen product runs forward and for its input's gradient; one that trains, for its weight's too; attention's backward pass is twice
    its forward.
    """

    def step(dit: DiTConfig, latents: Sequence[int], text: int) -> float:
        frozen = 3.0 if config.lora is None else 2.0
        extra = 0.0 if config.lora is None else 3.0 * low_rank(dit, latents, text, config.lora)
        return frozen * products(dit, latents, text) + 3.0 * attention(dit, latents, text) + extra

    return step
