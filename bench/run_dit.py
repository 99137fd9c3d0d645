"""`bench dit`: a transformer forward against diffusers' on the same weights and against the floor.

The floor is the bare matmuls and attention. On the CPU: two blocks of the 1.3B model's width,
float32 and bf16, all interleaved in one run; the result's "fp32" and "bf16" hold the ratios. On
CUDA: blocks of the 14B model at full size, timed at two depths; their difference is scaled to 40
blocks.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bench.dit_models import at_depth, calls, check, floor_call, make_case, our_model, same_function, their_model
from bench.harness import Options, Recorder, choose, model_dtypes
from bench.memory import peak_bytes
from bench.peaks import TEXT_TOKENS, attention_rate, floor_seconds, measure_peaks
from bench.providers import failure
from bench.registry import DTYPES, SHAPES, Shape
from bench.timing import Run, measure, ratio, significant, spread
from pusa_fast import DiTConfig

Row = dict[str, Any]

# Targets on a CPU, at "1.3b-2k" with two blocks and 512 text tokens.
TARGETS = {
    "fp32": {"speedup": 1.5, "speedup_scalar": 1.0, "x_floor": 1.3},
    "bf16": {"speedup": 1.3, "speedup_scalar": 1.0, "x_floor": 1.3},
}
LAYERS = 40
DEPTHS = (2, 4)


def run(options: Options, recorder: Recorder) -> None:
    recorder.save(
        note="forwards with one timestep per frame; diffusers gets the same per token, or one for all (scalar)"
    )
    (_run_cuda if recorder.device.type == "cuda" else _run_cpu)(options, recorder)


def _say_what_is_missing(recorder: Recorder) -> None:
    if importlib.util.find_spec("diffusers") is None:
        recorder.note(
            "diffusers is not installed (pip install diffusers): only our own model and the floor are measured"
        )


def _config(shape: Shape, layers: int) -> DiTConfig:
    return DiTConfig(shape.dim, shape.ffn, shape.heads, layers)


@torch.no_grad()
def _run_cpu(options: Options, recorder: Recorder) -> None:
    name, *more = choose("shape", options.shapes, list(SHAPES), ("tiny",) if options.quick else ("1.3b-2k",))
    if more:
        raise ValueError(f"--shape {more[0]}: on the CPU bench dit measures one shape a run, here {name}")
    shape, text = SHAPES[name], 16 if options.quick else TEXT_TOKENS
    dtypes = model_dtypes(options, recorder)
    recorder.save(shape=name, tokens=shape.tokens, frames=shape.grid[0], text_tokens=text, blocks=2)
    _say_what_is_missing(recorder)
    for dtype in dtypes:
        if recorder.out_of_time:
            recorder.note(f"{dtype} left out: out of time (--seconds)")
            continue
        recorder.working_on(f"two blocks, {name}, {dtype}")
        found = _compare_cpu(_config(shape, 2), shape, text, dtype, options.quick, recorder)
        recorder.save(**{dtype: found})
        _show_cpu(recorder, dtype, found)
        gc.collect()


def _compare_cpu(config: DiTConfig, shape: Shape, text: int, dtype: str, quick: bool, recorder: Recorder) -> Row:
    device, kind = recorder.device, DTYPES[dtype]
    dit = our_model(config, kind, device)
    theirs = their_model(dit) if importlib.util.find_spec("diffusers") else None
    errors = check(dit, theirs, min(text, 24)) if theirs is not None else {}
    case = make_case(config, shape.grid, text, kind, device)
    forwards = calls(dit, theirs, case)
    if theirs is not None:
        same_function(forwards["pusa"](), forwards["diffusers per-token"](), "pusa at the measured size", kind)
    forwards["floor"] = floor_call(dit, shape, text)
    runs = {name: Run(call) for name, call in forwards.items()}
    seconds = measure(runs, device, 0.5 if quick else 60.0, min_rounds=3 if quick else 7, max_rounds=25, warmup=1)
    peaks = {name: peak_bytes(call, device) for name, call in forwards.items() if name != "floor"}
    found: Row = {
        "x_floor": ratio(seconds["pusa"], seconds["floor"]),
        "x_floor_prepared": ratio(seconds["pusa prepared"], seconds["floor"]),
    }
    if theirs is not None:
        found = {
            "speedup": ratio(seconds["diffusers per-token"], seconds["pusa"]),
            "speedup_scalar": ratio(seconds["diffusers scalar"], seconds["pusa"]),
            **found,
            "peak_ratio": significant(peaks["pusa"] / peaks["diffusers per-token"]),
            "peak_ratio_scalar": significant(peaks["pusa"] / peaks["diffusers scalar"]),
        }
        if not quick and shape.name == "1.3b-2k":
            found["meets"] = meets(dtype, found)
    found["seconds"] = {name: spread(values) for name, values in seconds.items()}
    found["peak_mib"] = {name: significant(peak / 2**20) for name, peak in peaks.items()}
    found["relative_error"] = {name: significant(error) for name, error in errors.items()}
    return found


def meets(dtype: str, found: Row) -> dict[str, bool]:
    """The figures against `TARGETS`; peak memory must be below diffusers' at the same timesteps."""
    target = TARGETS[dtype]
    return {
        "speedup": found["speedup"] >= target["speedup"],
        "speedup_scalar": found["speedup_scalar"] > target["speedup_scalar"],
        "x_floor": found["x_floor"] <= target["x_floor"],
        "peak": found["peak_ratio"] < 1,
        "peak_scalar": found["peak_ratio_scalar"] < 1,
    }


def _show_cpu(recorder: Recorder, dtype: str, found: Row) -> None:
    lines = [
        [
            name,
            f"{own['median']:.3f}",
            f"{own['p20']:.3f}-{own['p80']:.3f}",
            f"{found['peak_mib'][name]:.0f}" if name in found["peak_mib"] else "",
        ]
        for name, own in found["seconds"].items()
    ]
    ratios = ", ".join(
        f"{name} {found[name]}"
        for name in ("speedup", "speedup_scalar", "x_floor", "x_floor_prepared")
        if name in found
    )
    recorder.table(f"{dtype}: {ratios}", ("forward", "s", "p20-p80", "peak MiB"), lines)


@torch.no_grad()
def _run_cuda(options: Options, recorder: Recorder) -> None:
    shapes = choose("shape", options.shapes, list(SHAPES), ("14b-480p",) if options.quick else ("14b-480p", "14b-720p"))
    peaks = measure_peaks(recorder.device, options.quick)
    rows: list[Row] = []
    depths = f"{DEPTHS[0]} and {DEPTHS[1]} blocks timed, the difference scaled to {LAYERS}"
    recorder.save(peaks=peaks, scaling=depths, rows=rows)
    recorder.note(f"bf16, {depths}.")
    _say_what_is_missing(recorder)
    for name in shapes:
        if recorder.out_of_time:
            rows.append({"shape": name, "status": "skipped", "reason": "out of time (--seconds)"})
            continue
        recorder.working_on(f"blocks of {name}")
        own = _compare_cuda(SHAPES[name], options, recorder, peaks)
        rows += own
        recorder.save(**({"bf16": _headline(own)} if "bf16" not in recorder.result else {}))
        _show_cuda(recorder, name, own)
        gc.collect()
        torch.cuda.empty_cache()


def _compare_cuda(shape: Shape, options: Options, recorder: Recorder, peaks: Row) -> list[Row]:
    device = recorder.device
    config = _config(shape, DEPTHS[-1])
    dit = our_model(config, torch.bfloat16, device)
    theirs = their_model(dit) if importlib.util.find_spec("diffusers") else None
    if theirs is not None:
        check(dit, theirs, 24)
    case = make_case(config, shape.grid, TEXT_TOKENS, torch.bfloat16, device)
    variants: dict[str, tuple[Any, Callable[[], Any]]] = {"floor": (dit, floor_call(dit, shape, TEXT_TOKENS))}
    for suffix in ("",) if options.quick else ("", ", compiled"):
        a, b = (dit, theirs) if not suffix else (_compiled(dit), _compiled(theirs))
        variants |= {
            f"{name}{suffix}": (a if name.startswith("pusa") else b, call) for name, call in calls(a, b, case).items()
        }
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for name, (model, call) in variants.items():
        row: Row = {"shape": shape.name, "dtype": "bf16", "provider": name, "status": "ok"}
        try:
            call()  # compiles, where it does
            if not name.startswith("pusa prepared"):
                row["peak_gib"] = significant(peak_bytes(call, device) / 2**30)
            ready = {f"{name}@{depth}": Run(_prefixed(name, model, depth, call, case)) for depth in DEPTHS}
            for item in ready.values():
                item.call()
            runs |= ready
        except Exception as error:  # out of memory, or what a compiler raises: a finding about this provider
            row |= {"status": "failed", "reason": failure(error)}
        rows[name] = row
    seconds = measure(runs, device, 5.0 if options.quick else 40.0, min_rounds=3, max_rounds=20)
    for name, row in rows.items():
        if row["status"] == "ok":
            row |= scaled(seconds, name)
    attend = attention_rate(shape, device)
    floors = floor_seconds(shape, LAYERS, peaks["product_bf16"]["tflops"] * 1e12, attend, peaks["copy"]["gbps"] * 1e9)
    rows["roofline"] = {
        "shape": shape.name,
        "dtype": "bf16",
        "provider": "roofline",
        "status": "ok",
        "forward_s": significant(floors["total"]),
        "parts": floors,
    }
    return list(rows.values())


def _prefixed(name: str, model: Any, depth: int, call: Callable[[], Any], case: Any) -> Callable[[], Any]:
    """A prepared state holds the cross-attention of all blocks: a shallower model needs its own."""
    if not name.startswith("pusa prepared"):
        return at_depth(model, depth, call)
    state = at_depth(model, depth, lambda: model.prepare(case.per_frame, case.text))()
    return at_depth(model, depth, lambda: model.denoise(case.x, 0, state))


def scaled(seconds: dict[str, list[float]], name: str) -> Row:
    """Times of one block, from the two depths, and of a forward of `LAYERS` blocks."""
    shallow, deep = (seconds[f"{name}@{depth}"] for depth in DEPTHS)
    blocks = [(b - a) / (DEPTHS[1] - DEPTHS[0]) for a, b in zip(shallow, deep, strict=True)]
    forward = [a + (LAYERS - DEPTHS[0]) * block for a, block in zip(shallow, blocks, strict=True)]
    return {"block_ms": spread(blocks, unit=1e3), "forward_s": spread(forward)["median"], "forward": spread(forward)}


def _compiled(model: Any) -> Any:
    """A copy whose blocks are compiled one by one, as both projects advise."""
    if model is None:
        return None
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.compile(dynamic=False)
    return twin


def _headline(rows: list[Row]) -> Row:
    """The same ratios as on the CPU, from times scaled to 40 blocks."""
    forward = {row["provider"]: row["forward_s"] for row in rows if row["status"] == "ok"}
    pairs = {
        "speedup": ("diffusers per-token", "pusa"),
        "speedup_scalar": ("diffusers scalar", "pusa"),
        "speedup_compiled": ("diffusers per-token, compiled", "pusa"),
        "x_floor": ("pusa", "floor"),
        "x_roofline": ("pusa", "roofline"),
    }
    found = {
        name: significant(forward[over] / forward[under])
        for name, (over, under) in pairs.items()
        if {over, under} <= forward.keys()
    }
    return {**found, "shape": rows[0]["shape"], "forward_s": forward}


def _show_cuda(recorder: Recorder, name: str, rows: list[Row]) -> None:
    lines = [
        [
            row["provider"],
            f"{row['block_ms']['median']:.2f}" if "block_ms" in row else "",
            f"{row['forward_s']:.3f}" if "forward_s" in row else row["status"],
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        ]
        for row in rows
    ]
    recorder.table(f"{name}, bf16", ("forward", "block ms", f"{LAYERS} blocks, s", "peak GiB"), lines)
