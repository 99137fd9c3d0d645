"""Videos with captions -> a store of latents and text rows (`pusa-fast prepare`).

First every file is hashed and decoded to its end, and its windows are chosen: what is bad is known before any model is loaded,
and what the store holds already is not made again. Then clips are encoded one by one, in the order of the list, the next one
being decoded meanwhile. Nothing that is written depends on time or on where an earlier run was stopped: a run that was
killed and repeated ends in the same bytes as one that was not.

Shapes: T frames, H/W pixels, C latent channels, F latent frames, h/w latent pixels, L rows of text, D its width.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast import video
from pusa_fast.config import VAEConfig
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.tiling import Tiling
from pusa_fast.model.vae import WanVAE
from pusa_fast.model.vae_memory import usable_memory, weight_bytes
from pusa_fast.pipeline import load_text_encoder, resolve_device
from pusa_fast.sampling.conditioning import to_video
from pusa_fast.training.buckets import STARTS, Bucket, parse_bucket, read_windows
from pusa_fast.training.catalog import Catalog, digest
from pusa_fast.training.planning import File, Plan, Progress, Settings, add_bad, make_plan, model_hashes
from pusa_fast.training.reference_tensors import read_tensors, text_width, trimmed
from pusa_fast.training.sheet import write_sheet
from pusa_fast.training.sources import Source, read_sources
from pusa_fast.training.store import EMPTY, INDEX, SHARD_CLIPS, SHARDS, LatentStore, StoreWriter, write_text
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import find_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
REPORT, SHEET, FILES = "report.json", "sheet.png", "files.json"
_OWN = frozenset({INDEX, SHARDS, EMPTY, REPORT, SHEET, FILES})


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
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prepare the clips that SOURCE lists (see `sources`) into the store `out`, new or begun; a `LatentStore` reads it.

    `buckets`: sizes such as "832x480x81"; None: the model's own. `fps`: resample to it; None: each clip's own frames. `start` of the
    windows: see `buckets.window_starts`. `dtype`: of what is stored. `tiling` of the VAE: as for `Pipeline`. `strict`: the first bad
    clip is an error. `progress(what, done, total)` runs after each file read and each clip made.

    Beside the store lie report.json (bad clips and why), sheet.png (first frames) and files.json (hashes of files that need not be
    read again). Raises ValueError or OSError for what cannot work, before anything is decoded where that can be known; ValueError
    where no clip could be prepared. What was written by then stays, in complete shards.
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
        files, sizes, fps, clips_per_video, start, seed, fit, dtype, tiles, strict, progress or (lambda what, done, total: None)
    )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _run(settings, entries, folder, where, shard_clips)


def _run(settings: Settings, entries: Sequence[Source], folder: Path, where: torch.device, shard_clips: int) -> Report:
    catalog = Catalog(folder / FILES)
    hashes = model_hashes(settings.files, catalog)
    begun = LatentStore(folder) if (folder / INDEX).exists() else None
    _check_begun(begun, {**hashes, "dtype": settings.dtype}, folder)
    held = {clip.key for clip in begun.clips} if begun else set()
    plan = make_plan(settings, entries, catalog, hashes)
    catalog.save()
    keys, notes = plan.keys, []
    if set(keys) - held or (keys and not (folder / EMPTY).exists()):
        notes = _encode(settings, plan, entries, folder, where, shard_clips, hashes)
    shapes = {clip.key: clip.shape for clip in LatentStore(folder).clips} if (folder / INDEX).exists() else {}
    done = [key for key in keys if key in shapes]
    spatial, temporal = VAEConfig().spatial_factor, VAEConfig().temporal_factor
    counts = Counter(
        str(Bucket(spatial * w, spatial * h, 1 + temporal * (F - 1))) for _, F, h, w in (shapes[key] for key in done)
    )
    bad = [(entries[i].name, plan.bad[i]) for i in sorted(plan.bad)]
    content = {
        "clips": len(done), "duplicates": plan.duplicates, "buckets": dict(sorted(counts.items())), "keys": digest(done),
        "bad": [{"source": name, "reason": reason} for name, reason in bad],
    }  # fmt: skip
    text = json.dumps(content, indent=1) + "\n"
    if not (folder / REPORT).is_file() or (folder / REPORT).read_text(encoding="utf-8") != text:
        # The sheet first: where the report stands, all stands.
        write_sheet(folder / SHEET, plan, set(done), settings)
        write_text(folder / REPORT, text)
    if not done:
        raise ValueError(f"none of {len(entries)} clips could be prepared; the first, {bad[0][0]}: {bad[0][1]}")
    return Report(len(done), len(set(done) - held), plan.duplicates, dict(sorted(counts.items())), bad, notes)


def _check(clips_per_video: int, start: str, seed: int, fit: str, dtype: str, shard_clips: int) -> None:
    for name, count in (("clips_per_video", clips_per_video), ("shard_clips", shard_clips)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    for name, value, choices in (("start", start, STARTS), ("fit", fit, video.FIT_MODES), ("dtype", dtype, tuple(DTYPES))):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: use {', '.join(choices)}")


def _check_folder(folder: Path, source: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file where a folder is to be written: choose another")
    if not folder.is_dir():
        return
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(f"{folder} is the folder of the clips themselves: choose another, such as {folder / 'prepared'}")
    strange = sorted(p.name for p in folder.iterdir() if p.name not in _OWN and not p.name.startswith(".") and p.suffix != ".part")
    if strange and not (folder / INDEX).exists():
        raise ValueError(f"{folder} holds {strange[0]}, which belongs to no prepared clips: choose another folder")


def _check_begun(begun: LatentStore | None, wanted: Mapping[str, str], folder: Path) -> None:
    """Refuse, before anything is decoded, what `StoreWriter` would refuse later."""
    for name, value in wanted.items():
        if begun is not None and begun.model.get(name) != value:
            raise ValueError(
                f"{folder} holds clips of another model ({name}: {begun.model.get(name)}, now {value}): choose another folder"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder, and clears away what a killed one was writing."""
    handle = None
    if os.name == "posix":
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder} is being written by another run: wait for it, or choose another folder") from None
        except OSError:
            pass  # some network disks know no locks
    try:
        for leftover in (*folder.glob(".*.tmp"), *(folder / SHARDS).glob(".*.tmp"), *folder.glob("*.json.part")):
            leftover.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)


class _NothingMade(Exception):
    """Leaves a new store without an index."""


def _encode(
    settings: Settings, plan: Plan, entries: Sequence[Source], folder: Path, where: torch.device, shard_clips: int, hashes: Mapping[str, str]
) -> list[str]:
    """Make the clips that the store lacks; returns notes. What is bad goes into the plan."""
    kind = torch.bfloat16 if where.type == "cuda" else torch.float32
    vae = load_vae(settings.files.vae, device=where, dtype=kind).eval()
    text, width, notes = _load_text(settings, plan, where, kind)
    model = {
        **hashes, "dtype": settings.dtype, "channels": vae.config.z_dim, "text_dim": width, "text_len": settings.files.text_len,
    }  # fmt: skip
    stored = DTYPES[settings.dtype]
    tiling = _tiles(settings.tiling, vae, text)
    places = {id(entry): i for i, entry in enumerate(entries)}
    notes += [] if text is None else _cut_captions(plan, text)
    with warnings.catch_warnings(), suppress(_NothingMade), StoreWriter(folder, model, shard_clips) as writer, ExitStack() as stack:
        warnings.filterwarnings("ignore", "the prompt has .* tokens")  # the note above says it once
        if text is not None and not (folder / EMPTY).exists():
            writer.write_empty_text(trimmed(text.encode([""])[0]).to(stored).cpu())
        missing = sum(key not in writer.keys for key in plan.keys)
        clips = stack.enter_context(closing(_ahead(_read(settings, plan, set(writer.keys), model))))
        for done, (file, start, made) in enumerate(clips, 1):
            entry = file.source
            if isinstance(made, Tensor):
                assert text is not None
                with _memory_for("prepare", where):
                    latents = vae.encode(to_video(made, where), tiling)[0]
                made = latents, trimmed(text.encode([entry.caption])[0])
            if not isinstance(made, Exception):
                latents, rows = (tensor.to(stored).cpu() for tensor in made)
                if latents.isfinite().all() and rows.isfinite().all():
                    details = _details(file, start, settings)
                    writer.add(file.windows[start], latents, rows, source=entry.name, caption=entry.caption, details=details)
                else:
                    made = ValueError(f"its latents or text are not finite in {settings.dtype}: choose another dtype, or look at the file")
            if isinstance(made, Exception):
                add_bad(plan, settings, places[id(entry)], entry, made)
            settings.progress("encoding", min(missing, done), missing)
        if not writer.keys:
            raise _NothingMade
    return notes


def _read(
    settings: Settings, plan: Plan, held: set[str], model: Mapping[str, Any]
) -> Iterator[tuple[File, int, Tensor | tuple[Tensor, Tensor] | Exception]]:
    """(file, start, frames or the reference's (latents, text) or why there are none) of each clip that the store lacks."""
    for file in plan.files:
        starts = [start for start, key in file.windows.items() if key not in held]
        if not starts:
            continue
        try:
            if file.bucket is None:
                assert file.source.tensors is not None
                yield file, 0, read_tensors(file.source.tensors, *(model[name] for name in ("channels", "text_dim", "text_len")))
                continue
            for start, frames in read_windows(file.source.path, starts, file.bucket, settings.fps, settings.fit):
                yield file, start, frames
        except (ValueError, OSError) as error:
            yield file, 0, error


def _ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


def _load_text(settings: Settings, plan: Plan, where: torch.device, kind: torch.dtype) -> tuple[TextEncoder | None, int, list[str]]:
    """The encoder, its width, and notes. Without one, clips that bring their own text can still be prepared."""
    try:
        text = load_text_encoder(settings.files, where, kind)
    except ValueError as error:
        tensors = [file.source.tensors for file in plan.files if file.bucket is None and file.source.tensors is not None]
        width = next((width for path in tensors if (width := text_width(path))), None)
        if len(tensors) < len(plan.files) or width is None:
            raise
        return None, width, [f"the empty caption is left out, so captions cannot be dropped in training: {error}"]
    return text, int(text.model.config.d_model), []


def _cut_captions(plan: Plan, text: TextEncoder) -> list[str]:
    """A note where captions have more tokens than the model reads."""
    long = [file.source.name for file in plan.files if file.bucket is not None and text.count_tokens(file.source.caption) > text.text_len]
    return [f"{len(long)} captions are cut after {text.text_len} tokens, all that the model reads; the first is that of {long[0]}"] if long else []


def _details(file: File, start: int, settings: Settings) -> dict[str, Any]:
    if file.bucket is None:
        return {"tensors": file.hash}
    return {"file": file.hash, "start": start, "frames": file.bucket.frames, "fps": settings.fps, "fit": settings.fit}


def _tiles(tiling: Tiling | None, vae: WanVAE, text: TextEncoder | None) -> Tiling | None:
    """"auto" with the memory that the weights of both models leave."""
    if tiling is None or tiling.mode != "auto" or tiling.memory is not None:
        return tiling
    parts = (vae, None if text is None else text.model)
    return Tiling.auto(max(1, usable_memory(vae.device) - weight_bytes(vae.device, *parts)))


@contextmanager
def _memory_for(stage: str, where: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"out of memory in {stage} on {where}: use tiling='auto', or a smaller bucket") from error
