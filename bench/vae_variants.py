"""Ways to run one direction of the VAE, compared: whole, tiled, in chunks, diffusers, the floor."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.dit_models import same_function
from bench.memory import peak_bytes
from bench.providers import failure
from bench.timing import Run, measure, ratio, significant, spread
from bench.vae_models import Call, Clip, our_call
from bench.vae_quality import psnr, seam, tile_lines
from pusa_fast import Tiling, WanVAE
from pusa_fast.testing import relative_error

Row = dict[str, Any]
Lines = tuple[list[int], list[int]]  # rows and columns where tiles meet
REFERENCES = ("pusa", "diffusers")
_MEMORY_MODEL = "pusa_fast.model.vae.memory"


@dataclass(frozen=True)
class Candidate:
    """`call` None: cannot run here, for this `reason`.

    `approximate`: differs from whole by more than rounding, as blending does.
    `instead_of`: runs only where that one failed. `predicted`: peak bytes by the model that chooses
    tilings.
    """

    name: str
    call: Call | None = None
    reason: str = ""
    approximate: bool = False
    lines: Lines | None = None
    predicted: int | None = None
    instead_of: str | None = None


def whole(vae: WanVAE, direction: str, x: Tensor) -> Candidate:
    return Candidate("pusa", our_call(vae, direction, x), predicted=predicted_peak(vae, direction, x, None))


def tilings(vae: WanVAE, direction: str, x: Tensor, clip: Clip) -> Iterator[Candidate]:
    """Both modes with the clip's tile; "exact" gives what whole gives."""
    scale = 1 if direction == "encode" else vae.config.spatial_factor
    sizes = (clip.height // vae.config.spatial_factor, clip.width // vae.config.spatial_factor)
    for mode, stride in (("feather", clip.stride), ("exact", clip.tile)):
        name = f"pusa {mode}"
        rows, columns = (tile_lines(*along, scale) for along in zip(sizes, clip.tile, stride, strict=True))
        try:
            tiling = Tiling(clip.tile, clip.stride, mode)
        except ValueError as error:
            yield Candidate(name, reason=str(error))
            continue
        predicted = predicted_peak(vae, direction, x, tiling)
        yield Candidate(
            name,
            our_call(vae, direction, x, tiling),
            approximate=mode == "feather",
            lines=(rows, columns),
            predicted=predicted,
        )


def chunk_sizes(vae: WanVAE, direction: str, x: Tensor, clip: Clip) -> Iterator[Candidate]:
    """Whole, with at most so many bytes in the largest activation of a chunk."""
    for size in clip.chunks:
        name = f"pusa chunks of {size / 2**20:g} MiB"
        if hasattr(vae, "chunk_bytes"):
            yield Candidate(name, _in_chunks(vae, size, our_call(vae, direction, x)))
        else:
            yield Candidate(name, reason="WanVAE has no chunk_bytes: the size of a chunk cannot be set")


def _in_chunks(vae: Any, size: int, call: Call) -> Call:
    def run() -> Any:
        kept, vae.chunk_bytes = vae.chunk_bytes, size
        try:
            return call()
        finally:
            vae.chunk_bytes = kept

    return run


def predicted_peak(vae: WanVAE, direction: str, x: Tensor, tiling: Any) -> int | None:
    """Peak bytes by our memory model; None where there is none yet."""
    if importlib.util.find_spec(_MEMORY_MODEL) is None:
        return None
    return int(importlib.import_module(_MEMORY_MODEL).peak_bytes(vae, direction, tuple(x.shape), tiling))


def no_memory_model() -> list[Row]:
    """A row that says so, where nothing predicts peaks."""
    if importlib.util.find_spec(_MEMORY_MODEL) is not None:
        return []
    return [
        {
            "provider": "pusa predicted peak",
            "status": "skipped",
            "reason": f"there is no {_MEMORY_MODEL}: peaks are measured only",
        }
    ]


def compare(
    candidates: Sequence[Candidate], clip: Clip, device: torch.device, budget: float, min_rounds: int, max_rounds: int
) -> list[Row]:
    """A row for each.

    Those of `REFERENCES` come first: the others are compared with them, and must agree unless
    approximate. What a candidate raises, out of memory above all, or that it computes something
    else, is a finding: it is not timed.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    values: dict[str, Tensor] = {}
    for candidate in candidates:
        if candidate.instead_of is not None and rows.get(candidate.instead_of, {}).get("status") == "ok":
            continue
        row = rows[candidate.name] = {"provider": candidate.name}
        if candidate.call is None:
            row |= {"status": "skipped", "reason": candidate.reason}
            continue
        try:
            row |= _look(candidate, candidate.call, values, device)
            runs[candidate.name] = Run(candidate.call)
        except Exception as error:
            row |= {"status": "failed", "reason": failure(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = measure(runs, device, budget, min_rounds=min_rounds, max_rounds=max_rounds, warmup=0)
    for name, spent in seconds.items():
        rows[name] |= {f"{key}_ms" if key != "n" else key: value for key, value in spread(spent, unit=1e3).items()}
        rows[name]["ms_per_frame"] = significant(rows[name]["median_ms"] / clip.frames)
        rows[name] |= {
            f"over_{other}": ratio(spent, seconds[other])
            for other in (*REFERENCES, "floor")
            if other in seconds and other != name
        }
    return list(rows.values())


def _look(candidate: Candidate, call: Call, values: dict[str, Tensor], device: torch.device) -> Row:
    """One call for its value, one for its peak. AssertionError: it differs from its reference."""
    row: Row = {"status": "ok"}
    value = call()
    for name, other in values.items() if isinstance(value, Tensor) else ():
        if not candidate.approximate:
            same_function(value, other, f"{candidate.name} beside {name}", value.dtype)
        row |= _differences(value, other, name, candidate.lines)
    if candidate.name in REFERENCES:
        values[candidate.name] = value
    del value
    peak = peak_bytes(call, device)
    row["peak_mib"] = significant(peak / 2**20)
    if candidate.predicted is not None:
        row |= {
            "predicted_mib": significant(candidate.predicted / 2**20),
            "predicted_over_measured": significant(candidate.predicted / peak),
        }
    return row


def _differences(value: Tensor, other: Tensor, name: str, lines: Lines | None) -> Row:
    """Relative error; of pixels also PSNR; of our tiles against whole also the seam metric."""
    found: Row = {f"error_{name}": significant(relative_error(value, other))}
    if value.shape[1] == 3:
        quality = psnr(value, other)
        found |= {} if quality is None else {f"psnr_{name}_db": significant(quality)}
    if lines is not None and name == "pusa":
        jump = seam(value.float() - other.float(), *lines)
        found |= {} if jump is None else {"seam": significant(jump)}
    return found
