"""Clips of a plan -> latents and text rows in a store, one by one in the order of the list, the next one being decoded meanwhile.

Latents that the store holds under another caption are copied: the VAE sees each window of a film once.

Shapes: T frames, H/W pixels, C latent channels, F latent frames, h/w latent pixels, L rows of text, D its width.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast.data.buckets import read_windows
from pusa_fast.data.planning import File, Plan, Settings, add_bad
from pusa_fast.data.reference_tensors import read_tensors, text_width, trimmed
from pusa_fast.data.sources import Source
from pusa_fast.data.store import EMPTY, StoreWriter, damage
from pusa_fast.device import default_dtype, out_of_memory, usable_memory, weight_bytes
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.sampling.conditioning import to_video
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import load_text_encoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

# Of a clip: frames [T, H, W, 3], the reference's (latents, text rows), None to copy latents, or why it cannot be made.
Read = Tensor | tuple[Tensor, Tensor] | Exception | None


class _NothingMade(Exception):
    """Leaves a new store without an index."""


def encode(
    settings: Settings,
    plan: Plan,
    entries: Sequence[Source],
    folder: Path,
    where: torch.device,
    shard_clips: int,
    hashes: Mapping[str, str],
) -> list[str]:
    """Make the clips that the store lacks; returns notes. What is bad goes into the plan. torch.OutOfMemoryError names what helps."""
    with out_of_memory("prepare", where):
        return _encode(settings, plan, entries, folder, where, shard_clips, hashes)


def _encode(
    settings: Settings,
    plan: Plan,
    entries: Sequence[Source],
    folder: Path,
    where: torch.device,
    shard_clips: int,
    hashes: Mapping[str, str],
) -> list[str]:
    kind = default_dtype(where)
    vae = load_vae(settings.files.vae, device=where, dtype=kind).eval()
    text, width, notes = _load_text(settings, plan, where, kind)
    model = {
        **hashes, "dtype": settings.dtype, "channels": vae.config.z_dim, "text_dim": width, "text_len": settings.files.text_len,
    }  # fmt: skip
    stored = DTYPES[settings.dtype]
    places = {id(entry): i for i, entry in enumerate(entries)}
    notes += [] if text is None else _cut_captions(plan, text)
    with (
        warnings.catch_warnings(),
        suppress(_NothingMade),
        StoreWriter(folder, model, shard_clips) as writer,
        ExitStack() as stack,
    ):
        warnings.filterwarnings("ignore", "the prompt has .* tokens")  # the note above says it once
        if text is not None and damage(folder / EMPTY):
            writer.write_empty_text(trimmed(text.encode([""])[0]).to(stored).cpu())
        maker = _Maker(settings, writer, vae, text, _tiles(settings.tiling, vae, text), where)
        missing = sum(key not in writer.keys for key in plan.keys)
        clips = stack.enter_context(
            closing(_ahead(_read(settings, plan, set(writer.keys), writer.latents_made, model)))
        )
        for done, (file, start, read) in enumerate(clips, 1):
            made = maker.make(file, start, read)
            if not isinstance(made, Exception):
                latents, rows = (tensor.to(stored).cpu() for tensor in made)
                if latents.isfinite().all() and rows.isfinite().all():
                    window, source = file.windows[start], file.source
                    writer.add(
                        window.key, latents, rows, source=source.name, caption=source.caption, details=window.details
                    )
                else:
                    made = ValueError(
                        f"its latents or text are not finite in {settings.dtype}: choose another dtype, or look at the file"
                    )
            if isinstance(made, Exception):
                add_bad(plan, settings, places[id(file.source)], file.source, made)
            settings.progress("encoding", min(missing, done), missing)
        if not writer.keys:
            raise _NothingMade
    return notes


@dataclass(frozen=True)
class _Maker:
    """The models, and what they have made so far."""

    settings: Settings
    writer: StoreWriter
    vae: WanVAE
    text: TextEncoder | None
    tiling: Tiling | None
    where: torch.device

    def make(self, file: File, start: int, read: Read) -> tuple[Tensor, Tensor] | Exception:
        """(latents [C, F, h, w], text rows [L, D]) of a clip, or why there are none."""
        latents = None
        if read is None:
            latents = self.writer.latents_of(file.windows[start].details["latents"])
        if read is None and latents is None:  # the clip to copy from turned out bad, perhaps for its caption
            read = _read_again(file, start, self.settings)
        if isinstance(read, (tuple, Exception)):
            return read
        assert self.text is not None
        if read is not None:
            latents = self.vae.encode(to_video(read, self.where), self.tiling)[0]
        assert latents is not None
        return latents, trimmed(self.text.encode([file.source.caption])[0])


def _read(
    settings: Settings, plan: Plan, held: set[str], latents: set[str], model: Mapping[str, Any]
) -> Iterator[tuple[File, int, Read]]:
    """Each clip that the store lacks, as it is read: `held` are the keys of the store, `latents` what it can copy."""
    for file in plan.files:
        starts = [start for start, window in file.windows.items() if window.key not in held]
        if not starts:
            continue
        try:
            if file.bucket is None:
                assert file.source.tensors is not None
                yield (
                    file,
                    0,
                    read_tensors(file.source.tensors, *(model[name] for name in ("channels", "text_dim", "text_len"))),
                )
                continue
            made_from = {start: str(file.windows[start].details["latents"]) for start in starts}
            fresh = [start for start in starts if made_from[start] not in latents]
            latents = latents | set(made_from.values())  # of clips to come, too
            frames = read_windows(file.source.path, fresh, file.bucket, settings.fps, settings.fit)
            for start in starts:
                yield file, start, next(frames)[1] if start in fresh else None
        except (ValueError, OSError) as error:
            yield file, 0, error


def _read_again(file: File, start: int, settings: Settings) -> Tensor | Exception:
    assert file.bucket is not None
    try:
        return next(read_windows(file.source.path, [start], file.bucket, settings.fps, settings.fit))[1]
    except (ValueError, OSError) as error:
        return error


def _ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


def _load_text(
    settings: Settings, plan: Plan, where: torch.device, kind: torch.dtype
) -> tuple[TextEncoder | None, int, list[str]]:
    """The encoder, its width, and notes. Without one, clips that bring their own text can still be prepared."""
    try:
        text = load_text_encoder(settings.files, where, kind)
    except ValueError as error:
        tensors = [
            file.source.tensors for file in plan.files if file.bucket is None and file.source.tensors is not None
        ]
        width = next((width for path in tensors if (width := text_width(path))), None)
        if len(tensors) < len(plan.files) or width is None:
            raise
        return None, width, [f"the empty caption is left out, so captions cannot be dropped in training: {error}"]
    return text, int(text.model.config.d_model), []


def _cut_captions(plan: Plan, text: TextEncoder) -> list[str]:
    """A note where captions have more tokens than the model reads."""
    long = [
        file.source.name
        for file in plan.files
        if file.bucket is not None and text.count_tokens(file.source.caption) > text.text_len
    ]
    return (
        [
            f"{len(long)} captions are cut after {text.text_len} tokens, all that the model reads; the first is that of {long[0]}"
        ]
        if long
        else []
    )


def _tiles(tiling: Tiling | None, vae: WanVAE, text: TextEncoder | None) -> Tiling | None:
    """ "auto" with the memory that the weights of both models leave."""
    if tiling is None or tiling.mode != "auto" or tiling.memory is not None:
        return tiling
    parts = (vae, None if text is None else text.model)
    return Tiling.auto(max(1, usable_memory(vae.device) - weight_bytes(vae.device, *parts)))
