"""The compiled part, pusa_fast._native: whether it is there, and how it takes tensors.

It is optional. Without it plain torch does its work, so nothing here raises at import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

IMPORT_ERROR: str | None = None
compiled: Any = None
try:
    compiled = importlib.import_module("pusa_fast._native")
except ImportError as error:
    IMPORT_ERROR = str(error)

# A tenth of the time of Tensor.__dlpack__, and takes parameters as they are.
capsule: Callable[[Tensor], object] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]


def missing(*functions: str) -> str | None:
    """Why these functions of the compiled part cannot be used, or None if they can."""
    if compiled is None:
        return f"{IMPORT_ERROR}; to build it: pip install -e ."
    absent = [name for name in functions if not hasattr(compiled, name)]
    if not absent:
        return None
    return (
        f"the compiled part lacks {', '.join(absent)}: it is older than this source, or its compiler was "
        "neither GCC nor Clang; to build it again: pip install -e ."
    )


def call(function: str, tensors: Iterable[Tensor | None], *numbers: float) -> None:
    """Run a function of the compiled part: tensors as DLPack capsules, then numbers, then torch's
    number of threads."""
    capsules = [None if t is None else capsule(t) for t in tensors]
    getattr(compiled, function)(*capsules, *numbers, torch.get_num_threads())
