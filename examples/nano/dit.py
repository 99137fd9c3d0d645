"""Stages 2 and 3 of nano: the text-to-video base, then the Pusa LoRA on it (paper section 3.3)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import muon
import stage
import torch
from text import TextStack
from torch import Tensor

from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import add_lora
from pusa_fast.model.vae import WanVAE
from pusa_fast.training import fafm, sprites

ARCHITECTURE = DiTConfig(dim=160, ffn_dim=640, num_heads=5, num_layers=6, text_dim=64, freq_dim=64)
SHIFT = 3.0
CLIPS, BATCH, CAPTION_DROPOUT = 6000, 32, 0.1
BASE_STEPS, LORA_STEPS, LORA_RANK = 3600, 800, 32
SHARD = 400


def digest(model: torch.nn.Module) -> str:
    """A short name for a model's weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().float().numpy().tobytes())
    return found.hexdigest()[:12]


def base_steps(scale: float) -> int:
    return max(1, round(BASE_STEPS * scale))


def lora_steps(scale: float) -> int:
    return max(1, round(LORA_STEPS * scale))


def scene(seed: int, index: int) -> sprites.Scene:
    """Training scene number `index`: every stage sees the same ones."""
    return sprites.draw_scene(stage.step_generator(seed + 10, index))


def encode_clips(vae: WanVAE, run: Path, seed: int, count: int) -> Tensor:
    """Normalised latents of the first `count` training scenes, half precision [N, C, F, h, w], made shard by shard.

    The folder's name carries a digest of the VAE's weights: latents of another VAE are never taken.
    """
    folder = run / f"latents-{digest(vae)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, count, SHARD):
        stop = min(count, start + SHARD)
        path = folder / f"{start}-{stop}.pt"
        if not path.exists():
            clips = sprites.render([scene(seed, i) for i in range(start, stop)])
            latents = torch.cat([_encode(vae, part) for part in clips.split(20)])
            stage.save_atomic(latents.half(), path)
            print(f"latents {stop}/{count}", flush=True)
        shards.append(torch.load(path, weights_only=True))
    return torch.cat(shards)


def _encode(vae: WanVAE, clips: Tensor) -> Tensor:
    return vae.encode(clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)


def loss_at(dit: WanDiT, text: TextStack, latents: Tensor, seed: int, step: int, *, synchronous: bool) -> Tensor:
    """The loss of one step; its batch and noise depend on seed and step only."""
    generator = stage.step_generator(seed + (20 if synchronous else 30), step)
    picks = torch.randint(len(latents), (BATCH,), generator=generator)
    captions = [sprites.caption(scene(seed, int(i)), generator) for i in picks]
    dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
    context = text(["" if drop else c for c, drop in zip(captions, dropped.tolist(), strict=True)])
    clean = latents[picks].float()
    noise = torch.randn(clean.shape, generator=generator)
    sigma = fafm.draw_levels(BATCH, clean.shape[2], SHIFT, generator, synchronous=synchronous)
    velocity = dit(fafm.add_noise(clean, noise, sigma), sigma * 1000, context)
    return fafm.fafm_loss(velocity, clean, noise)


def build_base(seed: int) -> tuple[WanDiT, TextStack]:
    torch.manual_seed(seed)
    return WanDiT(ARCHITECTURE), TextStack.build(ARCHITECTURE.text_dim)


def train_base(
    vae: WanVAE, run: Path, seed: int, scale: float, begun: tuple[WanDiT, TextStack] | None = None, start: int = 0
) -> tuple[WanDiT, TextStack]:
    """Text-to-video with one level per clip; the text encoder learns along. `begun`: weights after `start` steps."""
    latents = encode_clips(vae, run, seed, max(BATCH, round(CLIPS * scale)))
    dit, text = begun or build_base(seed)
    both = torch.nn.ModuleDict({"dit": dit, "text": text})
    optimizers = muon.split(both, lr=0.006, adam_lr=2e-3, keep_out=("shared", "head.head", "norm"))
    stage.train(
        "base", {"dit": dit, "text": text}, optimizers,
        lambda step: loss_at(dit, text, latents, seed, step, synchronous=True), base_steps(scale), run,
        plan=f"seed {seed}, {base_steps(scale)} steps, VAE {digest(vae)}", start=start,
    )  # fmt: skip
    return dit, text


def train_lora(dit: WanDiT, text: TextStack, vae: WanVAE, run: Path, seed: int, scale: float) -> WanDiT:
    """An adapter on the frozen base, each frame at a level of its own (FAFM, p_async = 1)."""
    latents = encode_clips(vae, run, seed, max(BATCH, round(CLIPS * scale)))
    text.requires_grad_(False)
    base = digest(dit)
    torch.manual_seed(seed)
    parameters = add_lora(dit, LORA_RANK)
    optimizers = [torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)]
    stage.train(
        "lora", {"dit": dit}, optimizers,
        lambda step: loss_at(dit, text, latents, seed, step, synchronous=False), lora_steps(scale), run,
        plan=f"seed {seed}, {lora_steps(scale)} steps, base {base}",
    )  # fmt: skip
    return dit


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
