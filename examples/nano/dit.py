"""Stages 4 and 5 of nano, by our trainer: text-to-video base, Pusa LoRA (paper, section 3.3)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.training.config import TrainConfig, parse_config
from pusa_fast.weights import checkpoint, keymap

ARCHITECTURE = DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=64, freq_dim=64)
SHIFT, TRAINING_SHIFT = 5.0, 3.0  # sampling takes larger steps at the end, where little is undecided
BASE_STEPS, LORA_STEPS, LORA_RANK, BATCH = 16240, 2000, 32, 32
P_ASYNC = 0.8  # the other clips keep text-to-video from degrading (docs/nano.md)


def base_steps(scale: float) -> int:
    return max(1, round(BASE_STEPS * scale))


def lora_steps(scale: float) -> int:
    return max(1, round(LORA_STEPS * scale))


def write_untrained(path: Path, seed: int) -> None:
    """An untrained transformer of nano's shape."""
    torch.manual_seed(seed)
    dit = WanDiT(ARCHITECTURE)
    checkpoint.save(path, keymap.unpack(dit.state_dict()), dit.config)


def base_config(model: Path, start: Path, clips: Path, out: Path, seed: int, scale: float) -> TrainConfig:
    """Text-to-video: one noise level a clip, all weights, 1 caption in 10 dropped for guidance."""
    return parse_config({
        **_common(model, clips, out, seed, base_steps(scale)),
        "dit": start,
        "lora": None,
        "objective": {"p_async": 0.0, "levels": "continuous", "weighting": "uniform", "shift": TRAINING_SHIFT},
        "optim": {
            "name": "muon", "lr": 2e-3, "muon_lr": 6e-3, "betas": (0.9, 0.99), "weight_decay": 0.0,
            "schedule": "cosine", "final_lr": 0.02, "warmup_steps": min(100, base_steps(scale) - 1),
            "clip_norm": 1.0, "ema_decay": 0.999,
        },
    })  # fmt: skip


def lora_config(model: Path, clips: Path, out: Path, seed: int, scale: float, **changes: Any) -> TrainConfig:
    """The Pusa LoRA: base frozen, one noise level per frame. `changes` replace whole sections."""
    return parse_config({
        **_common(model, clips, out, seed, lora_steps(scale)),
        "lora": {"rank": LORA_RANK},
        "objective": {"p_async": P_ASYNC, "levels": "continuous", "weighting": "uniform", "shift": TRAINING_SHIFT},
        "optim": {
            "lr": 2e-3, "betas": (0.9, 0.99), "schedule": "cosine", "final_lr": 0.02,
            "warmup_steps": min(40, lora_steps(scale) - 1), "clip_norm": 1.0, "ema_decay": 0.99,
        },
        **changes,
    })  # fmt: skip


def _common(model: Path, clips: Path, out: Path, seed: int, steps: int) -> dict[str, Any]:
    return {
        "model": str(model), "out": out, "seed": seed, "steps": steps, "batch_size": BATCH, "accumulate": 1,
        "device": "cpu", "data": {"path": clips, "caption_dropout": 0.1, "validation_clips": BATCH},
        "memory": {"checkpointing": "none"}, "checkpoints": {"every": 200}, "validation": {"every": 500},
        "logging": {"every": 50},
    }  # fmt: skip


def processes() -> int:
    """The largest number, up to torch's threads, that divides a batch evenly."""
    return max(n for n in range(1, torch.get_num_threads() + 1) if BATCH % n == 0)


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
