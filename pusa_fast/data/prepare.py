"""Videos with captions -> a store of latents and text rows (`pusa-fast prepare`).

First every file is hashed and decoded to its end, and its windows are chosen: what is bad is known before any model is loaded,
and what the store holds already is not made again. Then the clips are encoded (see `encoding`), and last of all the store's selection
names them: training sees those of the last run that came to its end. Nothing that is written depends on time or on where an
earlier run was stopped: a run that was killed and repeated ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pusa_fast import video
from pusa_fast.config import VAEConfig
from pusa_fast.data.buckets import STARTS, Bucket, parse_bucket
from pusa_fast.data.catalog import FILES, Catalog, digest
from pusa_fast.data.encoding import DTYPES, encode
from pusa_fast.data.lock import alone
from pusa_fast.data.planning import Plan, Progress, Settings, make_plan, model_hashes
from pusa_fast.data.sheet import write_sheet
from pusa_fast.data.sources import Source, read_sources
from pusa_fast.data.store import (
    EMPTY,
    INDEX,
    SELECTION,
    SHARD_CLIPS,
    SHARDS,
    StoredClip,
    damage,
    lost_clips,
    read_index,
    read_selection,
    write_selection,
    write_text,
)
from pusa_fast.device import resolve_device
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.weights.pretrained import find_model

REPORT, SHEET = "report.json", "sheet.png"
_OWN = frozenset({INDEX, SELECTION, SHARDS, EMPTY, REPORT, SHEET, FILES})


@dataclass(frozen=True)
class Report:
    """What a run did. `clips`: of SOURCE in the store, `new` of them made by this run; `duplicates`: equal ones left out;

    `buckets`: clips by their size; `bad`: (source, reason); `notes`: what else is to be said.
    """

    clips: int
    new: int
    duplicates: int
    buckets: Mapping[str, int]
    bad: Sequence[tuple[str, str]]
    notes: Sequence[str]


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "nano",
    buckets: Sequence[str] | None = None,
    fps: float | None = None,
    clips_per_video: int = 1,
    start: str = "first",
    seed: int = 0,
    fit: str = "crop",
    device: str | torch.device | None = None,
    dtype: str = "bfloat16",
    tiling: Tiling | str | None = None,
    shard_clips: int = SHARD_CLIPS,
    ignore_tensors: bool = False,
    add: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prepare the clips that SOURCE lists (see `sources`) into the store `out`, new or begun; a `LatentStore` reads it, and shows these.

    Other clips that `out` holds are kept, so that they need not be made again, but training no longer sees them; `add`: it goes on
    seeing those that it saw.

    `buckets`: sizes such as "832x480x81"; None: the model's own. `fps`: resample to it; None: each clip's own frames. `start` of the
    windows: see `buckets.window_starts`. `dtype`: of what is stored. `tiling` of the VAE: as for `Pipeline`. `strict`: the first bad
    clip is an error. `progress(what, done, total)` runs after each file read and each clip made.

    Shards that cannot be read are made anew. Beside the store lie report.json (bad clips and why), sheet.png (first frames) and
    files.json (hashes of files that need not be read again). Raises ValueError or OSError for what cannot work, before anything is
    decoded where that can be known; ValueError where no clip could be prepared, torch.OutOfMemoryError. What was written by then stays,
    in complete shards, and training sees what it saw before.
    """
    files = find_model(model)
    defaults = "{width}x{height}x{num_frames}".format_map(files.defaults)
    multiple = 2 * VAEConfig().spatial_factor  # of the VAE and the transformer's patches
    sizes = tuple(dict.fromkeys(parse_bucket(text, multiple) for text in (buckets or [defaults])))
    _check(clips_per_video, start, seed, fit, dtype, shard_clips)
    if fps is not None:
        video.rate_of(fps)
    if isinstance(tiling, str) and tiling != "auto":
        raise ValueError(f"tiling={tiling!r} is unknown: use None (whole), 'auto', or Tiling(...)")
    tiles = Tiling.auto() if isinstance(tiling, str) else tiling
    where, folder = resolve_device(device), Path(out)
    entries = read_sources(source, tensors=not ignore_tensors)
    _check_folder(folder, Path(source))
    settings = Settings(
        files,
        sizes,
        fps,
        clips_per_video,
        start,
        seed,
        fit,
        dtype,
        tiles,
        strict,
        progress or (lambda what, done, total: None),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        _clear(folder)
        return _run(settings, entries, folder, where, shard_clips, add)


def _run(
    settings: Settings, entries: Sequence[Source], folder: Path, where: torch.device, shard_clips: int, add: bool
) -> Report:
    catalog = Catalog(folder / FILES)
    hashes = model_hashes(settings.files, catalog)
    lost = _take_up(folder, {**hashes, "dtype": settings.dtype})
    held = _clips(folder)
    seen = read_selection(folder) if add else []
    kept = list(held) if seen is None else [key for key in seen if key in held]
    plan = make_plan(settings, entries, catalog, hashes)
    catalog.save()
    notes = _lost_clips(lost, plan.keys)
    if set(plan.keys) - held.keys() or (plan.keys and damage(folder / EMPTY)):
        notes += encode(settings, plan, entries, folder, where, shard_clips, hashes)
    clips = _clips(folder)
    done = [key for key in plan.keys if key in clips]
    buckets = _count([clips[key] for key in done])
    bad = [(entries[i].name, plan.bad[i]) for i in sorted(plan.bad)]
    _write_report(folder, settings, plan, done, buckets, bad)
    if not done:
        raise ValueError(f"none of {len(entries)} clips could be prepared; the first, {bad[0][0]}: {bad[0][1]}")
    chosen = list(dict.fromkeys([*kept, *done]))
    write_selection(folder, chosen)
    notes += _other_clips(folder, kept=len(chosen) - len(done), unused=len(clips) - len(chosen))
    return Report(len(done), len(set(done) - held.keys()), plan.duplicates, buckets, bad, notes)


def _take_up(folder: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Refuse a folder of another model, before anything is decoded. Returns its `lost_clips`; the rest is what training goes on seeing."""
    if not (folder / INDEX).exists():
        write_selection(folder, [])
        return {}
    _, model = read_index(folder)
    for name, value in wanted.items():
        if model.get(name) != value:
            raise ValueError(
                f"{folder} holds clips of another model ({name}: {model.get(name)}, now {value}): choose another folder"
            )
    if not (folder / SELECTION).exists():  # a folder of an older version, or one that was written by hand
        write_selection(folder, list(_clips(folder)))
    return lost_clips(folder)


def _clips(folder: Path) -> dict[str, StoredClip]:
    """Those that can be read, by key."""
    if not (folder / INDEX).exists():
        return {}
    lost = lost_clips(folder)
    return {clip.key: clip for clip in read_index(folder)[0] if clip.key not in lost}


def _count(clips: Sequence[StoredClip]) -> dict[str, int]:
    """Clips by the bucket that their latents tell of."""
    spatial, temporal = VAEConfig().spatial_factor, VAEConfig().temporal_factor
    counts = Counter(
        str(Bucket(spatial * w, spatial * h, 1 + temporal * (F - 1))) for _, F, h, w in (clip.shape for clip in clips)
    )
    return dict(sorted(counts.items()))


def _write_report(
    folder: Path,
    settings: Settings,
    plan: Plan,
    done: Sequence[str],
    buckets: Mapping[str, int],
    bad: Sequence[tuple[str, str]],
) -> None:
    content = {
        "clips": len(done), "duplicates": plan.duplicates, "buckets": buckets, "keys": digest(done),
        "bad": [{"source": name, "reason": reason} for name, reason in bad],
    }  # fmt: skip
    text = json.dumps(content, indent=1) + "\n"
    if not (folder / REPORT).is_file() or (folder / REPORT).read_text(encoding="utf-8") != text:
        # The sheet first: where the report stands, the sheet does.
        write_sheet(folder / SHEET, plan, set(done), settings)
        write_text(folder / REPORT, text)


def _lost_clips(lost: Mapping[str, str], keys: Collection[str]) -> list[str]:
    """A note where shards could not be read: `lost` as `lost_clips` returns it."""
    if not lost:
        return []
    shards = sorted(set(lost.values()))
    more = f", and {len(shards) - 1} more shards cannot be read" if len(shards) > 1 else ""
    again = len(lost.keys() & set(keys))
    others = f", {len(lost) - again} of other lists are gone" if again < len(lost) else ""
    return [f"shard {shards[0]}{more}: {again} clips are made anew{others}"]


def _other_clips(folder: Path, kept: int, unused: int) -> list[str]:
    notes = [f"{kept} clips of earlier lists or settings are kept beside these"] if kept else []
    if unused:
        notes.append(
            f"{unused} clips of earlier lists or settings stay in {folder} unused: prepare those again with --add to train on both"
        )
    return notes


def _check(clips_per_video: int, start: str, seed: int, fit: str, dtype: str, shard_clips: int) -> None:
    for name, count in (("clips_per_video", clips_per_video), ("shard_clips", shard_clips)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    for name, value, choices in (
        ("start", start, STARTS),
        ("fit", fit, video.FIT_MODES),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: use {', '.join(choices)}")


def _check_folder(folder: Path, source: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file where a folder is to be written: choose another")
    if not folder.is_dir():
        return
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(
            f"{folder} is the folder of the clips themselves: choose another, such as {folder / 'prepared'}"
        )
    strange = sorted(
        p.name for p in folder.iterdir() if p.name not in _OWN and not p.name.startswith(".") and p.suffix != ".part"
    )
    if strange and not (folder / INDEX).exists():
        raise ValueError(f"{folder} holds {strange[0]}, which belongs to no prepared clips: choose another folder")


def _clear(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for leftover in (*folder.glob(".*.tmp"), *(folder / SHARDS).glob(".*.tmp"), *folder.glob("*.json.part")):
        leftover.unlink(missing_ok=True)
