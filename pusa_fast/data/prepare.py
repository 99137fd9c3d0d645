"""Videos with captions -> a store of latents and text rows (`pusa-fast prepare`).

First every file is hashed and decoded to its end, and its windows are chosen: bad files are known
before any model is loaded, and clips that the store holds are not made again. Then the clips are
encoded (see `encoding`). Last, the store's selection names them: training sees the clips of the
last run that finished. Nothing that is written depends on time or on where an earlier run was
stopped: a run that was killed and repeated leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pusa_fast import video
from pusa_fast.config import Geometry
from pusa_fast.data import store
from pusa_fast.data.buckets import STARTS, Bucket, parse_bucket
from pusa_fast.data.catalog import FILES, Catalog, digest
from pusa_fast.data.durable import write_text
from pusa_fast.data.encoding import DTYPES, encode
from pusa_fast.data.lock import alone
from pusa_fast.data.planning import Plan, Progress, Settings, make_plan, model_hashes
from pusa_fast.data.sheet import write_sheet
from pusa_fast.data.sources import Source, read_sources
from pusa_fast.data.store import EMPTY, INDEX, SELECTION, SHARDS, StoredClip
from pusa_fast.device import out_of_memory, resolve_device
from pusa_fast.errors import ArgumentError
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.weights.pretrained import find_model, model_geometry

REPORT, SHEET = "report.json", "sheet.png"
_OWN = frozenset({INDEX, SELECTION, SHARDS, EMPTY, REPORT, SHEET, FILES})


@dataclass(frozen=True)
class Report:
    """What a run did: `clips` of SOURCE in the store, `new` ones of them, `duplicates` left out.

    `buckets`: clips by size; `bad`: (source, reason); `notes`: sentences for people.
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
    shard_clips: int = store.SHARD_CLIPS,
    ignore_tensors: bool = False,
    add: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prepare the clips that SOURCE lists (see `sources`) in the store `out`, new or existing.

    Training then sees these clips. Others in `out` are kept, so that they need not be made again;
    with `add`, training goes on seeing those that it saw.

    `buckets`: sizes such as "832x480x81"; None: the model's default. `fps`: resample to it; None:
    each clip's own frames. `start` of the windows: see `buckets.window_starts`. `dtype` of what is
    stored. `tiling` of the VAE: as for `Pipeline`. `strict`: the first bad clip is an error.
    `progress(what, done, total)` runs after each file read and each clip made.

    Clips in shards that cannot be read are made again. The folder also gets report.json (bad clips
    and why), sheet.png (first frames) and files.json (hashes, so that unchanged files are not read
    again). Raises ValueError or OSError for what cannot work, where possible before anything is
    decoded; ValueError where no clip could be prepared; torch.OutOfMemoryError. Complete shards
    stay, and training goes on seeing what it saw before.
    """
    files = find_model(model)
    geometry = model_geometry(files)
    defaults = "{width}x{height}x{num_frames}".format_map(files.defaults)
    sizes = tuple(dict.fromkeys(parse_bucket(text, geometry) for text in (buckets or [defaults])))
    _check(clips_per_video, start, seed, fit, dtype, shard_clips)
    if fps is not None:
        video.rate_of(fps)
    if isinstance(tiling, str) and tiling != "auto":
        raise ValueError(f"tiling={tiling!r} is unknown: use None (whole), 'auto', or Tiling(...)")
    tiles = Tiling.auto() if isinstance(tiling, str) else tiling
    where, folder = resolve_device(device), Path(out)
    sources = read_sources(source, tensors=not ignore_tensors)
    _check_folder(folder, Path(source))
    settings = Settings(
        files, geometry, sizes, fps, clips_per_video, start, seed, fit, dtype, tiles, strict,
        progress or (lambda what, done, total: None),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        _clear(folder)
        return _run(settings, sources, folder, where, shard_clips, add)


def _run(
    settings: Settings, sources: Sequence[Source], folder: Path, device: torch.device, shard_clips: int, add: bool
) -> Report:
    catalog, geometry = Catalog(folder / FILES), settings.geometry
    model = {
        **model_hashes(settings.files, catalog), "dtype": settings.dtype, "channels": geometry.channels,
        "text_dim": geometry.text_dim, "text_len": geometry.text_len,
    }  # fmt: skip
    lost, held = _take_up(folder, model)
    seen = store.read_selection(folder) if add else []
    kept = list(held) if seen is None else [key for key in seen if key in held]
    plan = make_plan(settings, model, sources, catalog)
    catalog.save()
    notes = _lost_clips(lost, plan)
    if set(plan.keys) - held.keys() or (plan.keys and store.damage(folder / EMPTY)):
        with out_of_memory("prepare", device):
            notes += encode(plan, folder, device, shard_clips)
    clips = store.readable_clips(folder)
    done = {key: clips[key] for key in plan.keys if key in clips}
    bad = [(sources[i].name, plan.bad[i]) for i in sorted(plan.bad)]
    report = Report(
        len(done), len(done.keys() - held.keys()), plan.duplicates, _count(done.values(), geometry), bad, notes
    )
    _write_report(folder, plan, done, report)
    if not done:
        raise ValueError(f"none of {len(sources)} clips could be prepared; the first, {bad[0][0]}: {bad[0][1]}")
    chosen = list(dict.fromkeys([*kept, *done]))
    store.write_selection(folder, chosen)
    if other := len(chosen) - len(done):
        notes.append(f"{other} clips of earlier lists or settings are kept with these")
    if unused := len(clips) - len(chosen):
        stay = f"{unused} clips of earlier lists or settings stay in {folder} unused"
        notes.append(f"{stay}: prepare those again with --add to train on both")
    return report


def _take_up(folder: Path, model: Mapping[str, object]) -> tuple[dict[str, str], dict[str, StoredClip]]:
    """(lost clips, readable clips) of a store. Raises ValueError for one of another model.

    Until this run has finished, training goes on seeing what it sees now.
    """
    if not (folder / INDEX).exists():
        store.write_selection(folder, [])
        return {}, {}
    store.check_model(folder, model)
    held = store.readable_clips(folder)
    if not (folder / SELECTION).exists():  # a folder of an older version, or one that was written by hand
        store.write_selection(folder, list(held))
    return store.lost_clips(folder), held


def _count(clips: Iterable[StoredClip], geometry: Geometry) -> dict[str, int]:
    """Clips by bucket."""
    sizes = (geometry.clip(clip.shape) for clip in clips)
    return dict(sorted(Counter(str(Bucket(width, height, frames)) for frames, height, width in sizes).items()))


def _write_report(folder: Path, plan: Plan, done: Collection[str], report: Report) -> None:
    content = {
        "clips": report.clips, "duplicates": report.duplicates, "buckets": report.buckets, "keys": digest(done),
        "bad": [{"source": name, "reason": reason} for name, reason in report.bad],
    }  # fmt: skip
    text = json.dumps(content, indent=1) + "\n"
    if not (folder / REPORT).is_file() or (folder / REPORT).read_text(encoding="utf-8") != text:
        write_sheet(folder / SHEET, plan, done)  # first: a report means that its sheet is written
        write_text(folder / REPORT, text)


def _lost_clips(lost: Mapping[str, str], plan: Plan) -> list[str]:
    """A note where shards could not be read: `lost` as `lost_clips` returns it."""
    if not lost:
        return []
    shards = sorted(set(lost.values()))
    more = f", and {len(shards) - 1} more shards cannot be read" if len(shards) > 1 else ""
    again = len(lost.keys() & set(plan.keys))
    others = f", {len(lost) - again} of other lists are gone" if again < len(lost) else ""
    return [f"shard {shards[0]}{more}: {again} clips are made again{others}"]


def _check(clips_per_video: int, start: str, seed: int, fit: str, dtype: str, shard_clips: int) -> None:
    for name, count in (("clips_per_video", clips_per_video), ("shard_clips", shard_clips)):
        if count < 1:
            raise ArgumentError(name, f" must be at least 1, got {count}")
    if seed < 0:
        raise ArgumentError("seed", f" must be at least 0, got {seed}")
    for name, value, choices in (
        ("start", start, STARTS), ("fit", fit, video.FIT_MODES), ("dtype", dtype, tuple(DTYPES)),
    ):  # fmt: skip
        if value not in choices:
            raise ArgumentError(name, f"={value!r} is unknown: use {', '.join(choices)}")


def _check_folder(folder: Path, source: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a folder is to be written there: choose another")
    if not folder.is_dir():
        return
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(
            f"{folder} is the folder of the clips themselves: choose another, such as {folder / 'prepared'}"
        )
    names = sorted(p.name for p in folder.iterdir() if p.name not in _OWN and p.suffix != ".part")
    strange = [name for name in names if not name.startswith(".")]
    if strange and not (folder / INDEX).exists():
        raise ValueError(f"{folder} holds {strange[0]}, which is not part of prepared clips: choose another folder")


def _clear(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for leftover in (*folder.glob(".*.tmp"), *(folder / SHARDS).glob(".*.tmp"), *folder.glob("*.json.part")):
        leftover.unlink(missing_ok=True)
