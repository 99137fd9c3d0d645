"""Bytes that one inference block of the 14B model moves between matmuls and attention, on meta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa_fast import ops
from pusa_fast.config import DiTConfig
from pusa_fast.model.dit import Pending, WanDiT
from pusa_fast.model.fp8 import quantize
from pusa_fast.model.rope import rope_tables

GRID, DIM, HEADS = (21, 30, 52), 5120, 40
TOKENS = GRID[0] * GRID[1] * GRID[2]
U = TOKENS * DIM * 2  # one bf16 activation

PRODUCTS = {"aten::addmm", "aten::mm", "aten::bmm", "aten::_addmm_activation", "aten::_scaled_mm"}
ATTENTION = {"pusa_fast::flash_attention"}


class ByteCounter(TorchDispatchMode):
    """Bytes of elements that each op reads and writes, without views, matmuls and attention.

    An argument counts its own elements, whatever it is a view of; one that the op mutates counts as
    written too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and name not in PRODUCTS | ATTENTION:
            self.bytes[name] = self.bytes.get(name, 0) + sum(_moved(func, args, kwargs or {}, out))
        return out


def _moved(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Iterator[int]:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for name, value in named.items():
        for t in tree_leaves(value):
            if isinstance(t, Tensor):
                yield t.numel() * t.element_size() * (2 if name in written else 1)
    fresh = [r.alias_info is None for r in func._schema.returns]
    results = out if isinstance(out, (tuple, list)) else (out,) if fresh else ()
    for t, is_fresh in zip(results, fresh, strict=True):
        if is_fresh:
            yield from (leaf.numel() * leaf.element_size() for leaf in tree_leaves(t) if isinstance(leaf, Tensor))


def count(backend: str, grad: bool = False, fp8: bool = False) -> dict[str, int]:
    """One block in steady state on meta, the last block's update pending except under grad.

    Attention is one op, as every package behind `pusa_fast::flash_attention` is; on meta, torch's
    own would be many.
    """
    config = DiTConfig(dim=DIM, ffn_dim=13_824, num_heads=HEADS, num_layers=1)
    with torch.device("meta"):
        dit = WanDiT(config).bfloat16()
        block = (quantize(dit, emulate=True) if fp8 else dit).blocks[0]
        x, y = (torch.empty(1, TOKENS, DIM, dtype=torch.bfloat16) for _ in range(2))
        t_mod = torch.empty(1, GRID[0], 6, DIM, dtype=torch.float32)
        k, v = torch.empty(1, 512, 2, HEADS, DIM // HEADS, dtype=torch.bfloat16).unbind(2)
        gate = torch.empty(1, GRID[0], DIM)
    rope = tuple(t.to("meta") for t in rope_tables(DIM // HEADS, max(GRID)))
    pending = Pending() if grad else Pending(y, gate)
    counter = ByteCounter()
    with torch.set_grad_enabled(grad), ops.use(backend), counter:
        block(x, pending, t_mod, (k, v), rope, GRID, "fa4", grad)
    return counter.bytes


def report(title: str, counted: dict[str, int]) -> float:
    units = sum(counted.values()) / U
    parts = ", ".join(f"{name} {moved / U:.2f}" for name, moved in sorted(counted.items()) if moved > U / 100)
    print(f"\n{title}: {units:.2f} u ({parts})")
    return units


def test_an_inference_block_moves_18_activations(capsys: pytest.CaptureFixture[str]) -> None:
    cuda, fp8 = count("triton"), count("triton", fp8=True)
    with capsys.disabled():
        units = report("inference, CUDA path", cuda)
        report("inference, CUDA path, fp8", fp8)
        report("training forward, CUDA path", count("triton", grad=True))
        if ops.backends()["native"] is None:
            report("inference, CPU path", count("native"))
        report("inference, plain torch", count("reference"))
    assert 18 <= units <= 18 * 1.05
    assert sum(fp8.values()) / U <= 23.6 * 1.05
    assert set(cuda) <= {"pusa_fast::residual_norm", "pusa_fast::qk_rope_", "pusa_fast::rms_norm"}, "copies or casts"


def test_the_counter_counts() -> None:
    x = torch.empty(4, 6, dtype=torch.float32, device="meta")
    with ByteCounter() as counter:
        (x.t()[1:] + 1).to(torch.bfloat16)
        x[:, ::2].clone()
        x.add_(x)
        x @ torch.empty(6, 2, device="meta")
    sizes = {"aten::add": 2 * 5 * 4 * 4, "aten::_to_copy": 5 * 4 * (4 + 2), "aten::clone": 2 * 4 * 3 * 4}
    assert {name: counter.bytes[name] for name in sizes} == sizes
    assert counter.bytes["aten::add_"] == 24 * 4 * (2 + 1) and "aten::mm" not in counter.bytes
