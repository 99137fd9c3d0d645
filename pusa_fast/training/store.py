"""Clips as the trainer reads them: latents and text rows in sharded safetensors, with an index.

    prepared/index.json                 what the clips were made with, and one entry a clip
    prepared/shards/00000.safetensors   "<key>.latents" [C, F, h, w], "<key>.text" [L, D]: the rows of the caption's tokens
    prepared/empty_text.safetensors     "text": the rows of the empty caption, for caption dropout

A shard is complete or not there, and the index names complete shards only: a writer that was killed goes on from there, to
the same bytes. Where the reference pads text to 512 rows of mostly zeros, a store holds the caption's own rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa_fast.weights.files import save

INDEX, SHARDS, EMPTY = "index.json", "shards", "empty_text.safetensors"
FORMAT = "pusa-fast latents 1"
SHARD_CLIPS = 64


@dataclass(frozen=True)
class StoredClip:
    """One clip of a store. `key`: hash of all that its latents and text were made from; `source`: for people to find it."""

    key: str
    source: str
    caption: str
    shape: tuple[int, int, int, int]  # C, F, h, w
    tokens: int  # rows of text
    shard: str
    details: Mapping[str, Any] = field(default_factory=dict)  # hash of the file, first frame, fps ...


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the old one as it was."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class LatentStore:
    """Reads a folder that `StoreWriter` or `pusa-fast prepare` wrote.

    `clips`: the entries, in the order of preparation; `model`: what the latents and text were made with (`vae`, `text`: hashes;
    `channels`, `text_dim`, `text_len`). Raises FileNotFoundError, ValueError for a folder that is no store or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.clips, self.model = _read_index(self.folder)
        missing = sorted({c.shard for c in self.clips if not (self.folder / SHARDS / c.shard).is_file()})
        if missing:
            raise FileNotFoundError(f"{self.folder}: shard {missing[0]} is missing: restore it, or prepare again")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def text_len(self) -> int:
        return int(self.model["text_len"])

    @cached_property
    def fingerprint(self) -> str:
        """Names the contents: which clips, in which order, made with which model."""
        text = json.dumps([self.model, [c.key for c in self.clips]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def latents(self, index: int) -> Tensor:
        """[C, F, h, w] as stored."""
        return self._tensor(index, "latents", self.clips[index].shape)

    def text(self, index: int) -> Tensor:
        """[text_len, D]: the caption's rows, then zeros."""
        clip = self.clips[index]
        return self._padded(self._tensor(index, "text", (clip.tokens, int(self.model["text_dim"]))))

    @cached_property
    def empty_text(self) -> Tensor:
        """[text_len, D] of the empty caption. Raises ValueError where the store has none."""
        path = self.folder / EMPTY
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no empty caption, so captions cannot be dropped: prepare again, or set caption_dropout to 0")
        return self._padded(_open(path).get_tensor("text"))

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(self.text_len - len(rows), rows.shape[1])])

    def _tensor(self, index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        clip = self.clips[index]
        path = self.folder / SHARDS / clip.shard
        try:
            tensor: Tensor = _open(path).get_tensor(f"{clip.key}.{name}")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and its entries by preparing again into a new folder") from error
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{path}: {name} of {clip.source} is {list(tensor.shape)}, the index says {list(shape)}")
        return tensor


class StoreWriter:
    """Adds clips to a store, new or begun. `keys`: the clips that it already holds; `model`: as `LatentStore.model`.

    A context manager: leaving it without an error writes the last, shorter shard. After an error or a kill the store holds
    the complete shards. Raises ValueError where the folder holds clips of another model.
    """

    def __init__(self, folder: str | os.PathLike[str], model: Mapping[str, Any], shard_clips: int = SHARD_CLIPS) -> None:
        if shard_clips < 1:
            raise ValueError(f"a shard holds at least 1 clip, got {shard_clips}")
        self.folder, self.model, self.shard_clips = Path(folder), dict(model), shard_clips
        self._clips: list[StoredClip] = []
        if (self.folder / INDEX).exists():
            clips, found = _read_index(self.folder)
            if differing := sorted(k for k in found.keys() | self.model.keys() if found.get(k) != self.model.get(k)):
                raise ValueError(
                    f"{self.folder} holds clips of another model ({differing[0]}: {found.get(differing[0])}, now "
                    f"{self.model.get(differing[0])}): choose another folder"
                )
            self._clips = list(clips)
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self.keys = {clip.key for clip in self._clips}
        self._waiting: list[tuple[StoredClip, dict[str, Tensor]]] = []

    def write_empty_text(self, rows: Tensor) -> None:
        """Rows [L, D] of the empty caption."""
        save(self.folder / EMPTY, {"text": rows})

    def add(
        self, key: str, latents: Tensor, text: Tensor, *, source: str, caption: str, details: Mapping[str, Any] | None = None
    ) -> None:
        """latents [C, F, h, w]; text [L, D], L at most text_len. ValueError for shapes that do not fit, or a key that is there."""
        channels, width, most = (int(self.model[k]) for k in ("channels", "text_dim", "text_len"))
        if latents.ndim != 4 or latents.shape[0] != channels:
            raise ValueError(f"{source}: latents must be [{channels}, F, h, w], got {list(latents.shape)}")
        if text.ndim != 2 or text.shape[1] != width or not 1 <= len(text) <= most:
            raise ValueError(f"{source}: text must be [1..{most}, {width}], got {list(text.shape)}")
        if key in self.keys:
            raise ValueError(f"{source}: this clip is in {self.folder} already")
        C, F, h, w = latents.shape
        clip = StoredClip(key, source, caption, (C, F, h, w), len(text), self._next_shard(), dict(details or {}))
        tensors = {f"{key}.latents": latents, f"{key}.text": text}
        self._waiting.append((clip, tensors))
        self.keys.add(key)
        if len(self._waiting) == self.shard_clips:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, then the index that names it."""
        if not self._waiting:
            return
        save(self.folder / SHARDS / self._next_shard(), {n: t for _, tensors in self._waiting for n, t in tensors.items()})
        self._clips += [clip for clip, _ in self._waiting]
        self._waiting.clear()
        self._write_index()

    def _next_shard(self) -> str:
        return f"{len({clip.shard for clip in self._clips}):05d}.safetensors"

    def _write_index(self) -> None:
        entries = [asdict(clip) for clip in self._clips]
        lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
        head = json.dumps({"format": FORMAT, "model": self.model}, sort_keys=True)[:-1]
        write_text(self.folder / INDEX, f'{head}, "clips": [\n{lines}\n]}}\n')

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.flush()
            if not (self.folder / INDEX).exists():
                self._write_index()


def _read_index(folder: Path) -> tuple[tuple[StoredClip, ...], dict[str, Any]]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no prepared clips (no {INDEX}): run pusa-fast prepare SOURCE --out {folder}")
    names = [f.name for f in fields(StoredClip)]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r} instead of {FORMAT!r}")
        clips = tuple(StoredClip(**{n: entry[n] for n in names} | {"shape": tuple(entry["shape"])}) for entry in found["clips"])
        return clips, dict(found["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another program ({error}): restore it, or prepare again") from error


@lru_cache(maxsize=64)
def _handle(path: Path, changed: int, size: int) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _open(path: Path) -> Any:
    status = path.stat()
    try:
        return _handle(path, status.st_mtime_ns, status.st_size)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or prepare again into a new folder") from error
