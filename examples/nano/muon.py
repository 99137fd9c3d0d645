"""Muon for convolution kernels in float32, AdamW for the rest.

torch.optim.Muon takes only matrices and orthogonalises in bfloat16, which is far slower than
float32 on a CPU without bf16 units.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised in five Newton-Schulz steps (Jordan 2024); AdamW's RMS (x 0.2)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(mean, group["momentum"]).flatten(1))
                rows, columns = update.shape
                p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end within 0.7 .. 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def split(
    model: nn.Module, *, lr: float, adam_lr: float, keep_out: tuple[str, ...] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for hidden kernels and matrices; AdamW for vectors, narrow layers and `keep_out`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = {
        n: p
        for n, p in named
        if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 8 and not any(part in n for part in keep_out)
    }
    rest = [p for n, p in named if n not in hidden]
    return [Muon(hidden.values(), lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)]
