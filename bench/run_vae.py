"""`bench vae`: encode and decode against diffusers' AutoencoderKLWan and the bare convolutions.

On the CPU the true-size VAE on 17 frames of 128x224, float32 and bf16, all interleaved in one run;
the result's "fp32" and "bf16" hold the ratios for "decode" and "encode", its "rows" tilings and
chunk sizes against the whole clip. On CUDA 81 frames at 480p and 720p in bf16, every way to run
them as a row.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
from typing import Any

import torch

from bench import vae_variants
from bench.dit_models import same_function
from bench.harness import Options, Recorder, choose, model_dtypes
from bench.memory import peak_bytes
from bench.registry import DEFAULT_DTYPES, DTYPES
from bench.run_e2e import FRAMES, SIZES
from bench.timing import Run, measure, ratio, significant, spread
from bench.vae_models import (
    DIRECTIONS,
    Clip,
    Layer,
    check,
    conv_layers,
    floor_call,
    make_input,
    our_call,
    our_model,
    their_call,
    their_model,
)
from bench.vae_variants import Candidate
from pusa_fast import VAEConfig, WanVAE

Row = dict[str, Any]

# The aims on a CPU, for encode and decode alike; and of blending and finishing a tiled decode
# against the reference's torch code.
TARGETS = {
    "fp32": {"speedup": 1.3, "x_floor": 1.25, "peak_ratio": 1.0},
    "bf16": {"speedup": 1.6, "x_floor": 1.25, "peak_ratio": 1.0},
}
BLEND_TARGET = 10.0
MIB = 2**20
CPU_CLIP = Clip(17, 128, 224, tile=(12, 16), stride=(8, 12), chunks=(16 * MIB, 64 * MIB, 256 * MIB))
CPU_QUICK = Clip(5, 64, 64, tile=(6, 6), stride=(4, 4), chunks=(MIB,))
CUDA_CHUNKS = (512 * MIB, 2048 * MIB, 8192 * MIB)


def run(options: Options, recorder: Recorder, config: VAEConfig | None = None) -> None:
    """`config`: of a smaller VAE, for tests; such a result holds no "meets"."""
    recorder.save(
        note="encode: pixels to the normalised mean; decode: normalised latents to pixels clamped to [-1, 1]; batch 1"
    )
    if importlib.util.find_spec("diffusers") is None:
        recorder.note("diffusers is not installed (pip install diffusers): only our own VAE and the floor are measured")
    (_run_cuda if recorder.device.type == "cuda" else _run_cpu)(options, recorder, config)


@torch.no_grad()
def _run_cpu(options: Options, recorder: Recorder, config: VAEConfig | None) -> None:
    if options.size is not None:
        raise ValueError(
            f"--size {options.size}: on the CPU bench vae measures {CPU_CLIP} only; sizes are for --device cuda"
        )
    clip = CPU_QUICK if options.quick else CPU_CLIP
    dtypes = model_dtypes(options, recorder)
    targets = {**TARGETS, "blend_speedup": BLEND_TARGET}
    recorder.save(clip=str(clip), frames=clip.frames, base_dim=(config or VAEConfig()).base_dim, targets=targets)
    rows: list[Row] = []
    for dtype in dtypes:
        if recorder.out_of_time:
            recorder.note(f"{dtype} left out: out of time (--seconds)")
            continue
        recorder.working_on(f"models and gate, {dtype}")
        vae, theirs, errors = _models(config or VAEConfig(), dtype, recorder.device)
        _compare_cpu(vae, theirs, clip, dtype, recorder, options.quick, promised=not options.quick and config is None)
        recorder.save(relative_error={**recorder.result.get("relative_error", {}), dtype: errors})
        if dtype == dtypes[-1]:  # by default bf16, where a call takes a fifth of the time
            rows = _variants_cpu(vae, clip, dtype, recorder, options.quick)
        del vae, theirs
        gc.collect()
    recorder.save(rows=[*rows, *vae_variants.no_memory_model()])
    _blend(recorder, options.quick)


def _models(config: VAEConfig, dtype: str, device: torch.device) -> tuple[WanVAE, Any, Row]:
    """Ours, theirs if diffusers is installed, and their errors. AssertionError: the gate failed."""
    vae = our_model(config, DTYPES[dtype], device)
    theirs = their_model(vae) if importlib.util.find_spec("diffusers") else None
    return vae, theirs, {name: significant(error) for name, error in check(vae, theirs).items()}


def _compare_cpu(
    vae: WanVAE, theirs: Any, clip: Clip, dtype: str, recorder: Recorder, quick: bool, promised: bool
) -> None:
    """Both directions into the result, under the dtype's name."""
    found: Row = {}
    for direction in DIRECTIONS:
        if recorder.out_of_time:
            recorder.note(f"{dtype} {direction} left out: out of time (--seconds)")
            continue
        recorder.working_on(f"{direction} of {clip}, {dtype}")
        own = found[direction] = _direction_cpu(vae, theirs, direction, clip, recorder.device, quick)
        if promised and "speedup" in own:
            own["meets"] = meets(dtype, own)
        recorder.save(**{dtype: found})
    if found:
        _show_cpu(recorder, dtype, found)


def _direction_cpu(vae: WanVAE, theirs: Any, direction: str, clip: Clip, device: torch.device, quick: bool) -> Row:
    """diffusers' model and ours, checked against each other, then timed with the floor."""
    x = make_input(vae, direction, clip)
    calls = {"pusa": our_call(vae, direction, x)}
    if theirs is not None:
        calls["diffusers"] = their_call(theirs, vae.config, direction, x)
        same_function(calls["pusa"](), calls["diffusers"](), f"pusa, {direction} of {clip}", x.dtype)
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    layers = conv_layers(vae, direction, clip)
    calls["floor"] = floor_call(layers)
    if x.dtype == torch.bfloat16:  # in float32 the time to lay out weights is negligible
        calls["floor packed"] = floor_call(layers, packed=True)
    for name in calls.keys() - peaks.keys():
        calls[name]()  # the others are warm
    runs = {name: Run(call) for name, call in calls.items()}
    seconds = measure(runs, device, 0.5 if quick else 60.0, min_rounds=2 if quick else 3, max_rounds=9, warmup=0)
    return _figures(seconds, peaks, layers, clip, vae_variants.predicted_peak(vae, direction, x, None))


def _figures(
    seconds: dict[str, list[float]], peaks: dict[str, int], layers: list[Layer], clip: Clip, predicted: int | None
) -> Row:
    own = seconds["pusa"]
    found: Row = {"x_floor": ratio(own, seconds["floor"])}
    if "floor packed" in seconds:
        found["x_floor_packed"] = ratio(own, seconds["floor packed"])
    if "diffusers" in seconds:
        found = {
            "speedup": ratio(seconds["diffusers"], own),
            **found,
            "peak_ratio": significant(peaks["pusa"] / peaks["diffusers"]),
        }
    if predicted is not None:
        found["predicted_over_measured_peak"] = significant(predicted / peaks["pusa"])
    spreads = {name: spread(values) for name, values in seconds.items()}
    flops = sum(layer.flops for layer in layers)
    return {
        **found,
        "seconds": spreads,
        "ms_per_frame": {name: significant(1e3 * value["median"] / clip.frames) for name, value in spreads.items()},
        "gflops": {name: significant(flops / value["median"] / 1e9) for name, value in spreads.items()},
        "peak_mib": {name: significant(peak / MIB) for name, peak in peaks.items()},
    }


def meets(dtype: str, found: Row) -> dict[str, bool]:
    """One direction's figures against `TARGETS`; peak memory has to be lower than diffusers'."""
    target = TARGETS[dtype]
    return {
        "speedup": found["speedup"] >= target["speedup"],
        "x_floor": found["x_floor"] <= target["x_floor"],
        "peak": found["peak_ratio"] < target["peak_ratio"],
    }


def _show_cpu(recorder: Recorder, dtype: str, found: Row) -> None:
    lines = [
        [
            direction,
            name,
            f"{value['median']:.3f}",
            f"{value['p20']:.3f}-{value['p80']:.3f}",
            f"{own['ms_per_frame'][name]:.4g}",
            str(own["peak_mib"].get(name, "")),
        ]
        for direction, own in found.items()
        for name, value in own["seconds"].items()
    ]
    ratios = "; ".join(
        f"{direction} "
        + ", ".join(
            f"{name} {own[name]}" for name in ("speedup", "x_floor", "x_floor_packed", "peak_ratio") if name in own
        )
        for direction, own in found.items()
    )
    recorder.table(f"{dtype}: {ratios}", ("", "who", "s", "p20-p80", "ms a frame", "peak MiB"), lines)


def _variants_cpu(vae: WanVAE, clip: Clip, dtype: str, recorder: Recorder, quick: bool) -> list[Row]:
    """Tilings and chunk sizes against the whole clip with default chunks."""
    rows: list[Row] = []
    for direction in DIRECTIONS:
        common: Row = {"direction": direction, "shape": str(clip), "dtype": dtype}
        if recorder.out_of_time:
            rows.append({**common, "provider": "pusa", "status": "skipped", "reason": "out of time (--seconds)"})
            continue
        recorder.working_on(f"{direction} in tiles and chunks, {dtype}")
        x = make_input(vae, direction, clip)
        candidates = [vae_variants.whole(vae, direction, x), *_own_variants(vae, direction, x, clip)]
        found = vae_variants.compare(candidates, clip, recorder.device, 0.0, min_rounds=1 if quick else 2, max_rounds=2)
        rows += [{**common, **row} for row in found]
    _show_rows(recorder, f"{clip}, {dtype}", rows)
    return rows


def _own_variants(vae: WanVAE, direction: str, x: torch.Tensor, clip: Clip) -> list[Candidate]:
    return [*vae_variants.tilings(vae, direction, x, clip), *vae_variants.chunk_sizes(vae, direction, x, clip)]


def _blend(recorder: Recorder, quick: bool) -> None:
    """Blending and finishing a tiled decode against the reference's code, if bench/ has it."""
    if importlib.util.find_spec("bench.vae_blend") is None:
        reason = "there is no bench/vae_blend.py"
        recorder.note(f"blend_speedup missing: {reason}")
        recorder.save(blend_speedup=None, blend={"status": "missing", "reason": reason})
        return
    if recorder.out_of_time:
        recorder.save(blend_speedup=None, blend={"status": "skipped", "reason": "out of time (--seconds)"})
        return
    recorder.working_on("blending")
    found = importlib.import_module("bench.vae_blend").run(quick)
    more = {} if quick else {"meets": {"blend_speedup": found["blend_speedup"] >= BLEND_TARGET}}
    recorder.save(blend_speedup=found["blend_speedup"], blend={"status": "ok", **found, **more})


@torch.no_grad()
def _run_cuda(options: Options, recorder: Recorder, config: VAEConfig | None) -> None:
    sizes = choose(
        "size", (options.size,) if options.size else (), list(SIZES), ("480p",) if options.quick else ("480p", "720p")
    )
    (dtype, *more) = choose("dtype", options.dtypes, list(DTYPES), DEFAULT_DTYPES["cuda"])
    if more:
        raise ValueError(f"--dtype {more[0]}: on a GPU bench vae measures one dtype a run, here {dtype}")
    recorder.working_on("models and gate")
    vae, theirs, errors = _models(config or VAEConfig(), dtype, recorder.device)
    rows: list[Row] = []
    recorder.save(
        size=options.size,
        frames=17 if options.quick else FRAMES,
        base_dim=vae.config.base_dim,
        relative_error={dtype: errors},
        rows=rows,
    )
    for size in sizes:
        clip = Clip(17 if options.quick else FRAMES, *SIZES[size], chunks=() if options.quick else CUDA_CHUNKS)
        for direction in DIRECTIONS:
            common: Row = {"direction": direction, "shape": str(clip), "size": size, "dtype": dtype}
            if recorder.out_of_time:
                rows.append({**common, "provider": "pusa", "status": "skipped", "reason": "out of time (--seconds)"})
                continue
            recorder.working_on(f"{direction} of {clip}, {dtype}")
            candidates = _candidates_cuda(vae, theirs, direction, clip)
            found = vae_variants.compare(
                candidates, clip, recorder.device, 10.0, min_rounds=3, max_rounds=3 if options.quick else 10
            )
            rows += [{**common, **row} for row in found]
            recorder.save()
            _show_rows(recorder, f"{direction} of {clip}, {dtype}", rows[-len(found) :])
    recorder.save(rows=[*rows, *vae_variants.no_memory_model()], **{dtype: _headline(rows)})


def _candidates_cuda(vae: WanVAE, theirs: Any, direction: str, clip: Clip) -> list[Candidate]:
    """diffusers whole, or in its own tiles if that does not fit; ours in every way; the floor."""
    x = make_input(vae, direction, clip)
    found = []
    if theirs is not None:
        tiled = Candidate(
            "diffusers tiled",
            their_call(theirs, vae.config, direction, x, tiled=True),
            approximate=True,
            instead_of="diffusers",
        )
        found += [Candidate("diffusers", their_call(theirs, vae.config, direction, x)), tiled]
    found += [vae_variants.whole(vae, direction, x), *_own_variants(vae, direction, x, clip)]
    layers = conv_layers(vae, direction, clip)
    ready = functools.cache(
        lambda: floor_call(layers)
    )  # made at the first call, which is not timed: not while the others need the memory
    return [*found, Candidate("floor", lambda: ready()())]


def _headline(rows: list[Row]) -> Row:
    """The CPU run's ratios, for the first size that was measured."""
    found: Row = {}
    for row in rows:
        if row["provider"] == "pusa" and row["direction"] not in found and row["status"] == "ok":
            ratios = {
                name: significant(1 / row[key], 4) for name, key in (("speedup", "over_diffusers"),) if key in row
            }
            found[row["direction"]] = {
                "shape": row["shape"],
                **ratios,
                **({"x_floor": row["over_floor"]} if "over_floor" in row else {}),
                "ms_per_frame": row["ms_per_frame"],
            }
    return found


def _show_rows(recorder: Recorder, title: str, rows: list[Row]) -> None:
    keys = ("median_ms", "ms_per_frame", "peak_mib", "psnr_pusa_db", "psnr_diffusers_db", "seam")
    lines = [
        [
            row.get("direction", ""),
            row["provider"],
            *(f"{row[key]:.5g}" if key in row else "" for key in keys),
            row.get("reason", ""),
        ]
        for row in rows
    ]
    recorder.table(
        title, ("", "how", "ms", "ms a frame", "peak MiB", "PSNR to whole", "to diffusers", "seam", ""), lines
    )
