"""A state dict to write to files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_files import TINY
from pusa_fast.model.dit import WanDiT
from pusa_fast.weights import keymap


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Random weights of TINY under official names."""
    model = WanDiT(TINY)
    return {name: torch.randn_like(tensor) for name, tensor in keymap.unpack(model.state_dict()).items()}
