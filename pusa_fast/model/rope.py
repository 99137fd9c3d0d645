"""Tables of the 3-D rotary position embedding (spec 1.3.7)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from pusa_fast.ops import rope_split

THETA = 10_000.0


def rope_tables(head_dim: int, positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [P, K/2], float32: row p for position p, columns by axis (frame, row, column).

    Column j of an axis with d columns turns by p * theta^(-2j / d). Angles are float64.
    """
    exponents = (torch.arange(0, d, 2, dtype=torch.float64, device=device) / max(d, 1) for d in rope_split(head_dim))
    frequencies = torch.cat([THETA**-exponent for exponent in exponents])
    angles_PK = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), frequencies)
    return angles_PK.cos().float(), angles_PK.sin().float()


class RopeCache:
    """The tables of the last few grids; not saved or moved with a model. Threads may share it."""

    def __init__(self, head_dim: int, capacity: int = 8) -> None:
        self.head_dim, self.capacity = head_dim, capacity
        self._tables: OrderedDict[tuple[int, torch.device], tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [P, K/2] on `device` for a grid (F, h, w) of tokens, P = max(grid)."""
        key = (max(grid), device)
        tables = self._tables.pop(key, None)  # taken out and put back, so that threads can share the cache
        if tables is None:
            # Tables first asked for under inference_mode must still serve a later training step.
            with torch.inference_mode(False):
                tables = rope_tables(self.head_dim, max(grid), device)
        self._tables[key] = tables
        while len(self._tables) > self.capacity:
            self._tables.popitem(last=False)
        return tables
