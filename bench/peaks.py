"""The roofline: the rates this machine reaches in this run, and a forward's time at those rates.

Copy bandwidth and matmul rates are measured, never taken from a datasheet. The arithmetic of a
forward (docs/performance.md): S tokens, D width, I width of the feed-forward, T text tokens; u is
one activation [S, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.registry import Shape
from bench.timing import CacheFlush, Run, measure, spread
from pusa_fast.attention import attention

TEXT_TOKENS = 512

# Memory traffic between a block's matmuls, in u. Ours: per kernel; others: docs/performance.md.
KERNEL_UNITS: Mapping[str, float] = {"K1": 4, "K2": 4, "K3": 4, "K4": 2, "K5": 4}
BLOCK_UNITS: Mapping[str, float] = {
    "reference": 144.4, "per-token": 115.4, "LightX2V": 38.4, "SGLang": 28.4,
    "pusa": sum(KERNEL_UNITS.values()), "pusa fp8": 23.6,
}  # fmt: skip


def block_flops(shape: Shape, text: int = TEXT_TOKENS) -> dict[str, float]:
    """Floating-point operations of one block's matmuls and attention, by part."""
    S, D = shape.tokens, shape.dim
    return {
        "qkv": 6.0 * S * D**2,
        "o": 2.0 * S * D**2,
        "self_attention": 4.0 * S**2 * D,
        "cross_q_o": 4.0 * S * D**2,
        "cross_kv": 4.0 * text * D**2,  # once a run, if prepared
        "cross_attention": 4.0 * S * text * D,
        "ffn": 4.0 * S * D * shape.ffn,
    }


def attention_flops(queries: int, keys: int, width: int, backward: bool = False) -> float:
    """Two matmuls forward; five backward, since the scores are recomputed."""
    return (10.0 if backward else 4.0) * queries * keys * width


def elementwise_bytes(shape: Shape, path: str = "pusa", itemsize: int = 2) -> float:
    """Bytes that one block moves between its matmuls."""
    return BLOCK_UNITS[path] * shape.tokens * shape.dim * itemsize


def floor_seconds(shape: Shape, layers: int, products: float, attention: float, copy: float) -> dict[str, float]:
    """Seconds of a bf16 forward at rates in FLOP/s, FLOP/s and bytes/s; blocks only, no overlap."""
    flops = block_flops(shape)
    scores = flops["self_attention"] + flops["cross_attention"]
    parts = {
        "products": layers * (sum(flops.values()) - scores) / products,
        "attention": layers * scores / attention,
        "elementwise": layers * elementwise_bytes(shape) / copy,
    }
    return {**parts, "total": sum(parts.values())}


def _budget(quick: bool) -> float:
    return 0.05 if quick else 0.5


def copy_bandwidth(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """GB/s, read plus written, of one large copy: a gigabyte on CUDA, more than any cache."""
    numel = (1 << 28 if device.type == "cuda" else 1 << 25) >> (3 if quick else 0)
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    seconds = measure(
        {"copy": Run(lambda: target.copy_(source))}, device, _budget(quick), flush=CacheFlush(device, not quick)
    )["copy"]
    moved = 2 * source.numel() * source.element_size()
    found = spread(seconds)
    return {"gbps": round(moved / found["median"] / 1e9, 2), "bytes": moved, "seconds": found}


def product_rate(device: torch.device, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
    """TFLOP/s of a square matmul of random matrices. ValueError: this device has no fp8 matmul."""
    n = (8192 if device.type == "cuda" else 2048) >> (2 if quick else 0)
    if dtype == torch.float8_e4m3fn:
        call = _fp8_product(n, device)
    else:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

        def call() -> Tensor:
            return a @ b

    found = spread(measure({"product": Run(call)}, device, _budget(quick), warmup=3)["product"])
    return {"tflops": round(2 * n**3 / found["median"] / 1e12, 3), "n": n, "seconds": found}


def _fp8_product(n: int, device: torch.device) -> Any:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"no fp8 matmul on {device}: it needs CUDA, compute capability 8.9 or later")
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.rand(n, 1, device=device) + 0.5
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def attention_rate(shape: Shape, device: torch.device, quick: bool = False) -> float:
    """FLOP/s of the backend that `auto` chooses, over all tokens of `shape`, in bf16."""
    q, k, v = (
        torch.randn(1, shape.tokens, shape.heads, shape.dim // shape.heads, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    seconds = measure({"attention": Run(lambda: attention(q, k, v))}, device, 2 * _budget(quick), min_rounds=3)[
        "attention"
    ]
    return attention_flops(shape.tokens, shape.tokens, shape.dim) / spread(seconds)["median"]


def measure_peaks(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """Copy bandwidth and matmul rates of this device."""
    found: dict[str, Any] = {"copy": copy_bandwidth(device, quick)}
    dtypes = (
        {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
        if device.type == "cuda"
        else {"fp32": torch.float32, "bf16": torch.bfloat16}
    )
    for name, dtype in dtypes.items():
        try:
            found[f"product_{name}"] = product_rate(device, dtype, quick)
        except (ValueError, RuntimeError) as error:
            found[f"product_{name}"] = {"reason": str(error).splitlines()[0]}
    return found
