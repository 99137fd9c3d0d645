"""Rows to a program of a row kernel, and warps that share them: closed forms, no autotuning.

These kernels wait for memory, so what matters is bytes in flight and no spilled registers, not the
best tile for every shape. Narrow rows share a program, so that no program is tiny; 16 elements a
thread keep several float32 tiles in registers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MAX_WIDTH = 16_384

_PER_THREAD = 16  # elements
_MIN_TILE = 2_048
_INTERPRETER_TILE = 1 << 16


@dataclass(frozen=True)
class RowLaunch:
    """`rows` x `block` elements a program, `warps` warps, `programs` of them."""

    rows: int
    block: int
    warps: int
    programs: int


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def power_of_2(n: int) -> int:
    """The next one, n included. Triton's own takes microseconds, of a launch's tens."""
    return 1 << (n - 1).bit_length()


def row_launch(
    rows: int, width: int, per_thread: int = _PER_THREAD, shared_per_thread: int = _PER_THREAD, tile: int = _MIN_TILE
) -> RowLaunch:
    """A launch that covers `rows` rows of `width` elements, each row within one program.

    A thread has at most `per_thread` elements of a row that is alone in its program, unless that
    takes over 16 warps. Narrow rows fill a program's `tile` of elements, `shared_per_thread` of
    them to a thread. The tile does not depend on `rows`: a row of a shard is added up in the same
    order as in the whole sequence. Raises ValueError: too wide.
    """
    if width > MAX_WIDTH:
        raise ValueError(
            f"row kernels take rows of at most {MAX_WIDTH} elements, got {width}: use the reference backend"
        )
    block = max(16, power_of_2(width))
    per_program = max(1, tile // block)
    if interpreted():  # which pays per program, and adds up every row alone
        per_program = max(1, min(_INTERPRETER_TILE // block, power_of_2(max(rows, 1))))
    if per_program == 1:
        warps = power_of_2(-(-width // (32 * per_thread)))  # ptxas drops what threads would do beyond the width
    else:
        warps = per_program * block // (32 * shared_per_thread)
    return RowLaunch(per_program, block, max(1, min(warps, 16)), -(-rows // per_program))
