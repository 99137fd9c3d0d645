"""The implementations that are held to the same tests."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session", autouse=True)
def _interpreter(interpreter_as_the_hardware: None) -> None:
    """For every test of this folder."""


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        memory = allocate(*args, **kwargs)
        return memory.fill_(math.nan) if memory.is_floating_point() else memory

    return filled


@pytest.fixture(params=["triton", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The launchers of one implementation, whose outputs hold NaN until they are written.

    `parametrize("kernels", ["triton"], indirect=True)` takes only one of them.
    """
    if request.param == "triton":
        pytest.importorskip("triton")
        module = importlib.import_module("pusa_fast.kernels.suite")
    else:
        module = importlib.import_module("pusa_fast.native.rows")
        if reason := module.available():
            pytest.skip(f"no native ops: {reason}")
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    return module


@pytest.fixture
def device(kernels: ModuleType) -> str:
    """Where the launchers of `kernels` run."""
    return "cuda" if torch.cuda.is_available() and kernels.__name__.endswith("suite") else "cpu"
