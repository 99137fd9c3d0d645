"""The cost of lower precision: nano in bf16 and fp8 against float32, by block and in whole clips.

Runs anywhere: without a GPU fp8 is emulated, with the same rounding of weights and activations
(the order of summation inside a matmul differs). A clip drifts from its float32 twin in any
arithmetic; compare fp8's drift with bf16's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from pusa_fast import Condition, Pipeline
from pusa_fast.data import sprites
from pusa_fast.model.fp8 import block_errors, quantize
from pusa_fast.weights import apply_lora
from pusa_fast.weights.pretrained import find_model

TIMESTEPS = (250.0, 500.0, 750.0, 1000.0)


def run(device: torch.device, clips: int = 16) -> dict[str, Any]:
    """{"blocks": {precision: [relative error of each block, of the velocity]}, "clips": {...}}."""
    exact = Pipeline.from_pretrained("nano", device=device, dtype=torch.float32)
    others = {"bf16": Pipeline.from_pretrained("nano", device=device, dtype=torch.bfloat16), "fp8": _quantised(device)}
    generator = torch.Generator().manual_seed(2024)
    scenes = [sprites.draw_scene(generator, held_out=True) for _ in range(clips)]
    return {
        "model": "nano",
        "clips_compared": clips,
        "emulated": device.type == "cpu",
        "blocks": {name: _blocks(pipe, exact, scenes[:4]) for name, pipe in others.items()},
        "clips": _clips(others, exact, scenes),
    }


def _quantised(device: torch.device) -> Pipeline:
    """As `precision="fp8"` loads it; emulated on the CPU, where that is refused."""
    pipe = Pipeline.from_pretrained("nano", lora={}, device=device, dtype=torch.bfloat16)
    for path, strength in find_model("nano").loras.items():
        apply_lora(pipe.dit, path, strength, keep_base=False)
    quantize(pipe.dit, emulate=device.type == "cpu")
    return pipe


def _blocks(pipe: Pipeline, exact: Pipeline, scenes: Sequence[sprites.Scene]) -> list[float]:
    """Means over prompts and noise levels; latent frame 0 is clean, as in image-to-video."""
    assert exact.text_encoder is not None
    found = []
    for seed, scene in enumerate(scenes):
        context = exact.text_encoder.encode([sprites.caption(scene)]).to(exact.device)
        x = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(seed)).to(exact.device)
        for level in TIMESTEPS:
            timestep = torch.tensor([[0.0, *[level] * 4]], device=exact.device)
            found.append(block_errors(pipe.dit, exact.dit, x, timestep, context))
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def _clips(others: Mapping[str, Pipeline], exact: Pipeline, scenes: Sequence[sprites.Scene]) -> dict[str, Any]:
    errors: dict[str, dict[str, list[float]]] = {}
    truths = sprites.render(scenes)
    for seed, (scene, truth) in enumerate(zip(track(scenes, "clips"), truths, strict=True)):
        for task, conditions in (("text-to-video", ()), ("image-to-video", (Condition(truth[0], 0, 0.0),))):
            frames = {
                name: pipe(sprites.caption(scene), conditions=conditions, seed=seed)
                for name, pipe in {"fp32": exact, **others}.items()
            }
            for name in others:
                for metric, value in _compare(frames[name], frames["fp32"]).items():
                    errors.setdefault(f"{name}, {task}", {}).setdefault(metric, []).append(value)
    return {name: {metric: _summary(values) for metric, values in row.items()} for name, row in errors.items()}


def _compare(frames: Tensor, exact: Tensor) -> dict[str, float]:
    """PSNR, and by the oracle: same direction of the object? How far apart do the two end?"""
    seen, wanted = sprites.measure(frames), sprites.measure(exact)
    apart = float((seen.centers[-1] - wanted.centers[-1]).norm().nan_to_num(32.0))
    return {
        "psnr_db": _psnr(frames, exact),
        "same_direction": float(seen.direction == wanted.direction),
        "end_apart_px": apart,
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _psnr(frames: Tensor, other: Tensor) -> float:
    error = float((frames.double() - other.double()).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(255.0**2 / error)))
