"""Optimisers, learning rates and averaged weights, from `config.Optim`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from pusa_fast.training.config import Optim

_MUON_MIN = 8  # a matrix with a shorter side is a table of gains, not a map
_MUON_NOT = ("head.head", "norm", "modulation")


def build_optimizers(named: Mapping[str, nn.Parameter], config: Optim) -> list[torch.optim.Optimizer]:
    """AdamW on all parameters; or Muon on hidden matrices, and AdamW on the rest.

    Muon: Jordan 2024, its updates scaled to AdamW's.
    """
    groups = dict(named)
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        hidden = hidden_matrices(named)
        groups = {n: p for n, p in groups.items() if n not in hidden}
        lr, decay = config.muon_lr or config.lr, config.weight_decay
        muon = torch.optim.Muon(hidden.values(), lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    adamw = torch.optim.AdamW(groups.values(), config.lr, config.betas, config.eps, config.weight_decay, fused=True)
    optimizers.append(adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # before a checkpoint replaces "lr" by the rate of its step
    return optimizers


def hidden_matrices(named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters for Muon: matrices that map one hidden state to another."""
    return {
        n: p
        for n, p in named.items()
        if p.ndim == 2 and min(p.shape) >= _MUON_MIN and not any(part in n for part in _MUON_NOT)
    }


def rate(step: int, steps: int, config: Optim) -> float:
    """Factor on the learning rate at `step` (from 0) of `steps`: warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to `initial_lr` times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` (None: never)."""
    if limit is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, limit)


class Average:
    """An exponential moving average of parameters: a += (1 - decay) (p - a) after each step.

    In the first steps the decay is smaller.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._named = dict(named)
        self.tensors = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = ([_local(t) for t in table.values()] for table in (self.tensors, self._named))
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters; a second call undoes it."""
        for name, p in self._named.items():
            mine, theirs = _local(self.tensors[name]), _local(p)
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)


def held_bytes(optimizers: Sequence[torch.optim.Optimizer], average: Average | None) -> int:
    """Bytes of the optimisers' states and of the average in this process."""
    states = [t for o in optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(_local(t).nbytes for t in (*states, *(average.tensors.values() if average else ())))


def _local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
