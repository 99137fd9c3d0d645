"""Triton's CPU interpreter, with the hardware's rounding of bf16 and e4m3 and faster; see conftest.

Alone, it truncates fp32 -> bf16 and fp32 -> e4m3, takes e4m3's NaN for 480, and converts
float64 -> bf16 as if to an integer. It also prepares `triton.language` for every call of a helper
function, which takes most of a program's time. Arithmetic on bf16 values stays wrong: kernels
upcast what they load, as they should anyway. Triton 3.6 and 3.7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# Triton's type -> what numpy holds its bits in, as torch types.
STORAGE = {
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float16: (torch.float16, torch.float16),
    tl.float32: (torch.float32, torch.float32),
    tl.float64: (torch.float64, torch.float64),
}
BITS_ONLY = {tl.float8e4nv, tl.bfloat16}  # numpy has no such number
E4M3_MAX = 448.0


def cast(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """`data`, bits of `source`, as bits of `target`: to nearest even, and e4m3 saturates."""
    (dtype, _), (target_dtype, target_bits) = STORAGE[source], STORAGE[target]
    values = torch.from_numpy(np.array(data)).view(dtype)  # a copy: torch warns of read-only arrays
    if target == tl.float8e4nv:
        values = values.clamp(-E4M3_MAX, E4M3_MAX)
    result: np.ndarray = values.to(target_dtype).view(target_bits).numpy()
    return result


prepared: set[str] = set()


def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a module sees of `triton.language` stays prepared: once for each is enough."""
    if self.fn.__module__ not in prepared:
        interpreter._patch_lang(self.fn)
        prepared.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def patch() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_to_nearest_even", False):
        return

    def with_rounding(original: Any) -> Any:
        def convert(self: Any, handle: Any, target_type: Any, mode: Any = None) -> Any:
            source, target = handle.dtype.scalar, target_type.scalar
            towards_zero = mode is not None and mode == interpreter._ir.ROUNDING_MODE.RTZ
            if towards_zero or not {source, target} <= STORAGE.keys() or not {source, target} & BITS_ONLY:
                return original(self, handle, target_type, *(() if mode is None else (mode,)))
            return interpreter.TensorHandle(cast(handle.data, source, target), target)

        return convert

    builder.cast_impl = with_rounding(builder.cast_impl)
    builder.create_fp_to_fp = with_rounding(builder.create_fp_to_fp)
    interpreter.InterpretedFunction.__call__ = call_helper
    builder.rounds_to_nearest_even = True
