"""Shared by nano's own training stages: the loop, its learning rate, checkpoints and log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_EVERY = 120.0  # seconds
WARMUP = 40  # steps


def cosine(step: int, total: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, total - WARMUP)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def save_atomic(value: Any, path: Path) -> None:
    """torch.save to a temporary name, then rename: a kill never leaves half a checkpoint."""
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    os.replace(part, path)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers that depend on seed and step alone, so a resumed run draws the same ones."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train(
    name: str,
    modules: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    loss_fn: Callable[[int], Tensor],
    steps: int,
    run: Path,
    *,
    plan: str,
    validate: Callable[[], dict[str, float]] = dict,
    start: int = 0,
    log_every: int = 50,
) -> None:
    """Minimise `loss_fn(step)` for `steps` steps, resuming from `run/name.pt`.

    Metrics go to `run/name.jsonl`. `plan` names what the weights depend on (seed, steps, input
    weights); ValueError for a checkpoint of another plan. `start`: the step of the modules'
    weights, without a checkpoint.
    """
    run.mkdir(parents=True, exist_ok=True)
    path, log = run / f"{name}.pt", run / f"{name}.jsonl"
    base_lr = [g["lr"] for o in optimizers for g in o.param_groups]
    spent = 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["plan"] != plan:
            raise ValueError(
                f"{path} is from another run ({saved['plan']}, not {plan}): delete it, or give another --run"
            )
        start, spent = saved["step"], saved["seconds"]
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        print(f"{name}: resumed at step {start}", flush=True)

    def save(step: int) -> None:
        states = {key: module.state_dict() for key, module in modules.items()}
        opt = [o.state_dict() for o in optimizers]
        save_atomic({"plan": plan, "step": step, "seconds": spent, "modules": states, "optimizers": opt}, path)

    params = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    began, saved_at, recent = time.monotonic() - spent, time.monotonic(), []
    for step in range(start, steps):
        for group, lr in zip([g for o in optimizers for g in o.param_groups], base_lr, strict=True):
            group["lr"] = lr * cosine(step, steps)
        loss = loss_fn(step)
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}: gradient norm {norm} at step {step}; the last checkpoint is {path}")
        for o in optimizers:
            o.step()
        recent.append(float(loss.detach()))
        spent = time.monotonic() - began
        if (step + 1) % log_every == 0 or step + 1 == steps:
            row = {"step": step + 1, "seconds": round(spent, 1), "loss": sum(recent) / len(recent), **validate()}
            recent.clear()
            print(name, json.dumps(row), flush=True)
            with log.open("a") as f:
                f.write(json.dumps(row) + "\n")
        if time.monotonic() - saved_at > SAVE_EVERY or step + 1 == steps:
            save(step + 1)
            saved_at = time.monotonic()
