"""Small transformers and LoRAs for them in every key style, as state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.weights import keymap

State = dict[str, Tensor]
TINY = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=8)
RANK = 3
MODULES = [f"{attn}.{p}" for attn in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
GLOBAL = (
    *(f"{part}_embedding.{layer}" for part in ("text", "time") for layer in (0, 2)),
    *("time_projection.1", "head.head"),
)


def model(dtype: torch.dtype = torch.float32) -> WanDiT:
    torch.manual_seed(7)
    dit = WanDiT(TINY).to(dtype)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.1)
    return dit


def official(dit: WanDiT) -> State:
    return {n: t.clone() for n, t in keymap.unpack(dit.state_dict()).items()}


def same_bits(a: State, b: State) -> bool:
    """torch.equal takes -0.0 for 0.0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        torch.equal(t.view(kinds[t.element_size()]), b[n].view(kinds[t.element_size()])) for n, t in a.items()
    )


def updates(seed: int = 1, modules: tuple[str, ...] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Official module -> (A, B), for ten projections of each block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n.removesuffix(".weight"): t.shape for n, t in keymap.unpack(model().state_dict()).items()}
    names = modules or tuple(f"blocks.{i}.{m}" for i in range(TINY.num_layers) for m in MODULES)
    return {
        n: (torch.randn(RANK, shapes[n][1], generator=generator), torch.randn(shapes[n][0], RANK, generator=generator))
        for n in names
    }


def style(down: str, up: str, prefix: str = "", rename: Callable[[str], str] = str) -> Callable[[Any], State]:
    def write(pairs: dict[str, tuple[Tensor, Tensor]]) -> State:
        keys = {prefix + rename(name): pair for name, pair in pairs.items()}
        return {key + suffix: t for key, pair in keys.items() for suffix, t in zip((down, up), pair, strict=True)}

    return write


PEFT = (".lora_A.weight", ".lora_B.weight")
DOWN = (".lora_down.weight", ".lora_up.weight")
STYLES = {
    "1 released": style(".lora_A.default.weight", ".lora_B.default.weight"),
    "1 any token": style(".lora_A.pusa_v1.weight", ".lora_B.pusa_v1.weight"),
    "2 peft": style(*PEFT),
    "3 diffusion_model": style(*PEFT, "diffusion_model."),
    "3 diffusion_model, token": style(".lora_A.default.weight", ".lora_B.default.weight", "diffusion_model."),
    "3 transformer": style(*PEFT, "transformer."),
    "3 base_model": style(*PEFT, "base_model.model."),
    "3 module": style(*PEFT, "module."),
    "3 pipe": style(".lora_A.default.weight", ".lora_B.default.weight", "pipe.dit."),
    "3 deepspeed": style(".lora_A.default.weight", ".lora_B.default.weight", "_forward_module.pipe.dit."),
    "4 down up": style(*DOWN),
    "4 down up, prefix": style(*DOWN, "diffusion_model."),
    "5 kohya": style(*DOWN, "lora_unet_", lambda n: n.replace(".", "_")),
    "5 kohya, diffusers": style(*DOWN, "lora_transformer_", lambda n: keymap.dit_to_diffusers(n).replace(".", "_")),
    "6 diffusers": style(*PEFT, "transformer.", keymap.dit_to_diffusers),
    "6 diffusers, bare": style(*PEFT, "", keymap.dit_to_diffusers),
    "8 _lora": style("_lora.down.weight", "_lora.up.weight"),
    "8 .lora": style(".lora.down.weight", ".lora.up.weight"),
    "8 no weight": style(".lora_A", ".lora_B"),
    "8 linear layer": style(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
