"""`bench ops`: every op by every provider, in microseconds, GB/s and per cent of the copy bandwidth
of the same run.

GB/s counts the bytes that one pass has to move, the same for all providers: who moves more shows
less.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from bench import providers
from bench.harness import Options, Recorder, choose
from bench.peaks import measure_peaks
from bench.providers import Candidate, build, candidates, check, failure, truths
from bench.registry import DEFAULT_DTYPES, DEFAULT_SHAPES, DTYPES, OPS, QUICK_SHAPES, SHAPES, Drawn, Op
from bench.timing import CacheFlush, Run, measure, ratio, significant, spread

Row = dict[str, Any]


def run(options: Options, recorder: Recorder) -> None:
    device = recorder.device
    shapes = choose(
        "shape", options.shapes, list(SHAPES), (QUICK_SHAPES if options.quick else DEFAULT_SHAPES)[device.type]
    )
    dtypes = choose("dtype", options.dtypes, list(DTYPES), DEFAULT_DTYPES[device.type])
    names = choose("op", options.ops, list(OPS), list(OPS))
    choose("provider", options.providers, providers.known_providers(), ())
    recorder.working_on("copy bandwidth and product rates")
    peaks = measure_peaks(device, options.quick)
    flush = CacheFlush(device, enabled=not options.quick)
    rows: list[Row] = []
    recorder.save(peaks=peaks, flush_bytes=flush.bytes, rows=rows)
    for shape in shapes:
        for dtype in dtypes:
            inputs = Drawn(SHAPES[shape], DTYPES[dtype], device)
            for name in names:
                rows += _measure_op(OPS[name], dtype, inputs, options, recorder, flush, peaks["copy"]["gbps"])
                recorder.save()
            inputs.clear()
            _release(device)
            _show(
                recorder, [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)], peaks["copy"]["gbps"]
            )


def _measure_op(
    op: Op, dtype: str, inputs: Drawn, options: Options, recorder: Recorder, flush: CacheFlush, copy_gbps: float
) -> list[Row]:
    device = inputs.device
    found = providers.usable(candidates(op, device, options.quick), options.providers)
    base = {"op": op.name, "kernel": op.kernel, "shape": inputs.shape.name, "dtype": dtype}
    skip = _left_out(op, device) or ("out of time (--seconds)" if recorder.out_of_time else None)
    if skip:
        return [{**base, "provider": name, "status": "skipped", "reason": skip} for name in found]
    recorder.working_on(f"{op.name}, {inputs.shape.name}, {dtype}")
    rows, runs = gate(op, found, inputs)
    budget = (0.3 if options.quick else 3.0) if device.type == "cpu" else 0.4
    seconds = measure(runs, device, budget, flush, min_rounds=3 if options.quick else 7)
    moved = op.bytes(inputs.shape, inputs.dtype.itemsize)
    out = [{**base, "provider": name, **row, **_figures(name, seconds, moved, copy_gbps)} for name, row in rows.items()]
    runs.clear()
    _release(device)
    return out


def gate(op: Op, found: Mapping[str, Candidate], inputs: Drawn) -> tuple[dict[str, Row], dict[str, Run]]:
    """(status of every candidate, those that may be timed): right first, fast second."""
    expected = truths(op, inputs)
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for name, candidate in found.items():
        if candidate.formulation is None:
            rows[name] = {"status": "unavailable", "reason": candidate.reason}
            continue
        try:
            run = build(op, candidate, inputs)
            rows[name] = {"status": "ok", **check(op, run, inputs, expected)}
        except Exception as error:
            rows[name] = {"status": "failed", "reason": failure(error)}
        else:
            runs[name] = run
    return rows, runs


def _figures(name: str, seconds: Mapping[str, list[float]], moved: int, copy_gbps: float) -> Row:
    if name not in seconds:
        return {"bytes": moved}
    own = spread(seconds[name], unit=1e6)
    gbps = moved / (own["median"] * 1e-6) / 1e9
    speed = {
        f"over_{other}": ratio(seconds[other], seconds[name])
        for other in ("eager", "torch.compile", "per-token", "reference", "diffusers")
        if other in seconds and other != name
    }
    return {
        "median_us": own["median"],
        "p20_us": own["p20"],
        "p80_us": own["p80"],
        "n": own["n"],
        "bytes": moved,
        "gbps": significant(gbps),
        "percent_of_copy": significant(100 * gbps / copy_gbps, 3),
        **speed,
    }


def _left_out(op: Op, device: torch.device) -> str | None:
    if op.fp8 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "fp8 needs CUDA, compute capability 8.9 or later"
    return None


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _show(recorder: Recorder, rows: list[Row], copy_gbps: float) -> None:
    if not rows:
        return
    lines = [
        [
            row["op"],
            row["provider"],
            *(
                [f"{row['median_us']:.1f}", f"{row['p20_us']:.1f}-{row['p80_us']:.1f}", f"{row['gbps']:.0f}"]
                if "median_us" in row
                else [row["status"], "", ""]
            ),
            f"{row['percent_of_copy']:.0f} %" if "median_us" in row else "",
            *(f"{row[key]:.2f}x" if key in row else "" for key in ("over_eager", "over_per-token")),
        ]
        for row in rows
        if row["status"] in ("ok", "failed")
    ]
    columns = ("op", "provider", "us", "p20-p80", "GB/s", "of copy", "vs eager", "vs per-token")
    recorder.table(f"{rows[0]['shape']}, {rows[0]['dtype']}; copy {copy_gbps:g} GB/s", columns, lines)
