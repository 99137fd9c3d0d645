"""`bench attention`: every backend of `pusa_fast.attention`, forward and backward, self and cross.

The correctness gate compares sampled query rows at full size, and all gradients at a small size,
with float64.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Options, Recorder, choose
from bench.peaks import TEXT_TOKENS, attention_flops, measure_peaks
from bench.providers import failure
from bench.registry import DEFAULT_DTYPES, DEFAULT_SHAPES, DTYPES, QUICK_SHAPES, SHAPES, Shape
from bench.timing import CacheFlush, Run, measure, ratio, significant, spread
from pusa_fast import attention as backends
from pusa_fast.testing import assert_within_budget

Row = dict[str, Any]
QKV = tuple[Tensor, Tensor, Tensor]

_SAMPLED = 16  # query rows that the gate compares
_SMALL = 200  # tokens of the case whose gradients it compares: not a multiple of any tile


def run(options: Options, recorder: Recorder) -> None:
    device = recorder.device
    shapes = choose(
        "shape", options.shapes, list(SHAPES), (QUICK_SHAPES if options.quick else DEFAULT_SHAPES)[device.type]
    )
    dtypes = choose("dtype", options.dtypes, list(DTYPES), DEFAULT_DTYPES[device.type])
    names = choose(
        "provider", options.providers, list(backends.BACKENDS), [n for n, b in backends.BACKENDS.items() if b.exact]
    )
    recorder.working_on("copy bandwidth and matmul rates")
    peaks = measure_peaks(device, options.quick)
    rows: list[Row] = []
    recorder.save(peaks=peaks, rows=rows)
    flush = CacheFlush(device, enabled=not options.quick)
    for shape in shapes:
        for dtype in dtypes:
            for kind in ("self", "cross"):
                for backward in (False, True):
                    case = Case(SHAPES[shape], dtype, kind, backward, device, options.quick)
                    if recorder.out_of_time:
                        rows += [
                            {**case.row, "provider": name, "status": "skipped", "reason": "out of time (--seconds)"}
                            for name in names
                        ]
                        continue
                    recorder.working_on(f"{kind} attention, {shape}, {dtype}, {case.row['direction']}")
                    rows += _measure_case(case, names, flush, peaks)
                    recorder.save()
                    gc.collect()
            _show(recorder, [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)])


class Case:
    """One problem; all backends share its tensors: q [1, L, H, K]; k, v [1, L or 512, H, K]."""

    def __init__(self, shape: Shape, dtype: str, kind: str, backward: bool, device: torch.device, quick: bool) -> None:
        keys = shape.tokens if kind == "self" else TEXT_TOKENS
        self.head_dim, self.dtype, self.device = shape.dim // shape.heads, DTYPES[dtype], device
        self.backward, self.quick = backward, quick
        self.qkv, self.grad = _draw(shape.tokens, keys, shape.heads, self.head_dim, self.dtype, device)
        small = min(_SMALL, keys)
        self.small, self.small_grad = _draw(small, small, 2, self.head_dim, self.dtype, device)
        self.flops = attention_flops(shape.tokens, keys, shape.dim, backward)
        self.row: Row = {
            "op": "attention", "kind": kind, "direction": "backward" if backward else "forward",
            "shape": shape.name, "dtype": dtype, "queries": shape.tokens, "keys": keys, "heads": shape.heads,
            "head_dim": self.head_dim, "flops": self.flops,
        }  # fmt: skip


def _draw(
    queries: int, keys: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[QKV, Tensor]:
    generator = torch.Generator(device).manual_seed(queries)

    def one(length: int) -> Tensor:
        return torch.randn(1, length, heads, width, generator=generator, device=device).to(dtype)

    return (one(queries), one(keys), one(keys)), one(queries)


def _measure_case(case: Case, names: list[str], flush: CacheFlush, peaks: dict[str, Any]) -> list[Row]:
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for name in names:
        try:
            backends.resolve(name, case.device, case.dtype, case.head_dim, case.backward)
        except ValueError as error:
            rows[name] = {"status": "unavailable", "reason": str(error)}
            continue
        try:
            lossy = not backends.BACKENDS[name].exact
            if not lossy:
                check(name, case)
            runs[name] = _run(name, case)
            rows[name] = {"status": "ok", **({"lossy": True} if lossy else {})}
        except Exception as error:  # whatever a backend raises is a finding about it
            rows[name] = {"status": "failed", "reason": failure(error)}
    budget = (0.5 if case.quick else 8.0) if case.device.type == "cpu" else 0.8
    seconds = measure(runs, case.device, budget, flush, min_rounds=3, warmup=1)
    return [{**case.row, "provider": name, **row, **_figures(name, case, seconds, peaks)} for name, row in rows.items()]


def _figures(name: str, case: Case, seconds: dict[str, list[float]], peaks: dict[str, Any]) -> Row:
    if name not in seconds:
        return {}
    own = spread(seconds[name], unit=1e3)
    tflops = case.flops / (own["median"] * 1e-3) / 1e12
    found: Row = {
        "median_ms": own["median"],
        "p20_ms": own["p20"],
        "p80_ms": own["p80"],
        "n": own["n"],
        "tflops": significant(tflops),
    }
    peak = peaks.get(f"product_{case.row['dtype']}", {}).get("tflops")
    if peak:
        found["percent_of_product"] = significant(100 * tflops / peak, 3)
    if "sdpa" in seconds and name != "sdpa":
        found["over_sdpa"] = ratio(seconds["sdpa"], seconds[name])
    return found


def _run(name: str, case: Case) -> Run:
    if not case.backward:
        return Run(lambda: _forward(name, case.qkv))
    leaves = [t.detach().requires_grad_() for t in case.qkv]
    with torch.enable_grad():
        out = backends.attention(*leaves, name)
    return Run(lambda: torch.autograd.grad(out, leaves, case.grad, retain_graph=True))


@torch.no_grad()
def _forward(name: str, qkv: QKV) -> Tensor:
    return backends.attention(*qkv, name)


def check(name: str, case: Case) -> None:
    """Raises AssertionError if the backend's results exceed the error budget."""
    (q, k, v), count = case.qkv, case.row["queries"]
    at = torch.linspace(0, count - 1, min(_SAMPLED, count), device=q.device).long()
    sample = (q[:, at], k, v)
    if case.backward:
        for part, value, oracle, low in zip("qkv", *_gradients(name, case.small, case.small_grad), strict=True):
            assert_within_budget(value, low, oracle, f"d{part} of {case.small[0].shape[1]} tokens")
        leaf = q.detach().requires_grad_()
        with torch.enable_grad():
            out = backends.attention(leaf, k, v, name)
            value = torch.autograd.grad(out, leaf, case.grad)[0][:, at]
            oracle, low = (
                _gradient(_plain, tuple(t.to(d) for t in sample), case.grad[:, at].to(d))[0]
                for d in (torch.float64, case.dtype)
            )
        assert_within_budget(value, low, oracle, "dq of sampled rows")
    else:
        value = _forward(name, case.qkv)[:, at]
        with torch.no_grad():
            oracle, low = _plain(*(t.double() for t in sample)), _plain(*sample)
        assert_within_budget(value, low, oracle, "sampled rows")


def _gradients(name: str, qkv: QKV, grad: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the backend's, float64's, plain torch's) gradients by q, k and v."""
    exact = tuple(t.double() for t in qkv)
    own = _gradient(lambda *leaves: backends.attention(*leaves, name), qkv, grad)
    return own, _gradient(_plain, exact, grad.double()), _gradient(_plain, qkv, grad)


@torch.enable_grad()
def _gradient(function: Callable[..., Tensor], qkv: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in qkv]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention; in float64 (the oracle) the plain formula, with all scores in memory."""
    with sdpa_kernel(SDPBackend.MATH) if q.dtype == torch.float64 else nullcontext():
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _show(recorder: Recorder, rows: list[Row]) -> None:
    lines = [
        [
            f"{row['kind']} {row['direction']}",
            row["provider"],
            *(
                [f"{row['median_ms']:.2f}", f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}", f"{row['tflops']:.3g}"]
                if "tflops" in row else [row["status"], "", ""]
            ),
            f"{row['percent_of_product']:.0f} %" if "percent_of_product" in row else "",
        ]
        for row in rows
        if row["status"] in ("ok", "failed")
    ]  # fmt: skip
    if lines:
        title = f"attention, {rows[0]['shape']}, {rows[0]['dtype']}"
        recorder.table(title, ("case", "backend", "ms", "p20-p80", "TFLOP/s", "of matmul rate"), lines)
