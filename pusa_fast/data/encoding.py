"""Clips of a plan -> latents and text rows in a store, one by one, the next one decoded meanwhile.

Latents that the store holds under another caption are copied: the VAE sees each window once.

Shapes: T frames, H/W pixels, C latent channels, F latent frames, h/w latent pixels, L rows of text,
D its width.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa_fast.data.buckets import read_windows
from pusa_fast.data.planning import Clip, Plan
from pusa_fast.data.reference_tensors import read_tensors, trimmed
from pusa_fast.data.store import EMPTY, StoreWriter, damage
from pusa_fast.device import default_dtype, usable_memory, weight_bytes
from pusa_fast.model.text import TextEncoder
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.model.vae.tiling import Tiling
from pusa_fast.sampling.conditioning import to_video
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import load_text_encoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

# Of a clip: frames [T, H, W, 3], the reference's (latents, text rows), None to copy latents, or why
# it cannot be made.
Read = Tensor | tuple[Tensor, Tensor] | Exception | None


def encode(plan: Plan, folder: Path, device: torch.device, shard_clips: int) -> list[str]:
    """Make the clips that the store in `folder` lacks; returns notes. Bad clips go into the plan.

    Where every clip is bad, a new store stays without an index.
    """
    settings, stored = plan.settings, DTYPES[plan.settings.dtype]
    vae = load_vae(settings.files.vae, device=device, dtype=default_dtype(device))
    text, notes = _load_text(plan, device)
    writer = StoreWriter(folder, plan.model, shard_clips)
    maker = _Maker(plan, writer, vae, text, _tiles(settings.tiling, vae, text))
    missing = sum(key not in writer.keys for key in plan.keys)
    with warnings.catch_warnings(), closing(_ahead(_read(plan, writer))) as clips:
        warnings.filterwarnings("ignore", "the prompt has .* tokens")  # a note says it once
        if text is not None and damage(folder / EMPTY):
            writer.write_empty_text(trimmed(text.encode([""])[0]).to(stored).cpu())
        for done, (clip, read) in enumerate(clips, 1):
            made = maker.make(clip, read)
            if not isinstance(made, Exception):
                latents, rows = (tensor.to(stored).cpu() for tensor in made)
                if latents.isfinite().all() and rows.isfinite().all():
                    source = clip.source
                    writer.add(
                        clip.key, latents, rows, source=source.name, caption=source.caption, details=clip.details
                    )
                else:
                    wrong = f"its latents or text are not finite in {settings.dtype}"
                    made = ValueError(f"{wrong}: choose another dtype, or look at the file")
            if isinstance(made, Exception):
                plan.add_bad(clip.number, clip.source, made)
            settings.progress("encoding", min(missing, done), missing)
    writer.flush()
    return notes


@dataclass(frozen=True)
class _Maker:
    """The models, and what they have made so far."""

    plan: Plan
    writer: StoreWriter
    vae: WanVAE
    text: TextEncoder | None
    tiling: Tiling | None

    def make(self, clip: Clip, read: Read) -> tuple[Tensor, Tensor] | Exception:
        """(latents [C, F, h, w], text rows [L, D]) of a clip, or why there are none."""
        latents = self.writer.latents_of(clip.details["latents"]) if read is None else None
        if read is None and latents is None:  # the clip to copy from turned out bad, perhaps for its caption
            try:
                read = next(_windows(self.plan, [clip]))
            except (ValueError, OSError) as error:
                return error
        if isinstance(read, (tuple, Exception)):
            return read
        assert self.text is not None
        if read is not None:
            latents = self.vae.encode(to_video(read, self.vae.device), self.tiling)[0]
        assert latents is not None
        return latents, trimmed(self.text.encode([clip.source.caption])[0])


def _read(plan: Plan, writer: StoreWriter) -> Iterator[tuple[Clip, Read]]:
    """Each clip that the store lacks, as it is read. An error ends the clips of its file."""
    held, latents = set(writer.keys), writer.latents_made
    for _, group in groupby((clip for clip in plan.clips if clip.key not in held), lambda clip: clip.number):
        clips = list(group)
        try:
            if clips[0].source.tensors is not None:
                yield clips[0], read_tensors(clips[0].source.tensors, plan.settings.geometry)
                continue
            fresh = [clip for clip in clips if clip.details["latents"] not in latents]
            latents.update(clip.details["latents"] for clip in clips)  # also of clips to come
            frames = _windows(plan, fresh)
            for clip in clips:
                yield clip, next(frames) if clip in fresh else None
        except (ValueError, OSError) as error:
            yield clips[0], error


def _windows(plan: Plan, clips: list[Clip]) -> Iterator[Tensor]:
    """Frames [T, H, W, 3] of clips of one file, in order."""
    if clips:
        source, bucket, settings = clips[0].source, clips[0].bucket, plan.settings
        assert bucket is not None
        starts = [clip.start for clip in clips]
        yield from (frames for _, frames in read_windows(source.path, starts, bucket, settings.fps, settings.fit))


def _ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


def _load_text(plan: Plan, device: torch.device) -> tuple[TextEncoder | None, list[str]]:
    """The text encoder, and notes. None if it does not load and every clip brings its text."""
    files, captioned = plan.settings.files, [clip for clip in plan.clips if clip.bucket is not None]
    try:
        text = load_text_encoder(files, device, default_dtype(device))
    except ValueError as error:
        if captioned:
            raise
        return None, [f"the empty caption is left out, so captions cannot be dropped in training: {error}"]
    captions = {clip.number: clip.source for clip in captioned}
    long = [source.name for source in captions.values() if text.count_tokens(source.caption) > text.text_len]
    if not long:
        return text, []
    cut = f"{len(long)} captions are cut after {text.text_len} tokens, all that the model reads"
    return text, [f"{cut}; the first is that of {long[0]}"]


def _tiles(tiling: Tiling | None, vae: WanVAE, text: TextEncoder | None) -> Tiling | None:
    """Gives "auto" the memory that the weights of both models leave."""
    if tiling is None or tiling.mode != "auto" or tiling.memory is not None:
        return tiling
    parts = (vae, None if text is None else text.model)
    return Tiling.auto(max(1, usable_memory(vae.device) - weight_bytes(vae.device, *parts)))
