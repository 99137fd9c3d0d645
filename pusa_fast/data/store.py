"""Clips as the trainer reads them: latents and text rows in sharded safetensors, with an index.

    prepared/index.json                 what the clips were made with, and one entry a clip
    prepared/selection.json             the clips that training sees, in their order: none until the first prepare is done; without it all
    prepared/shards/00000.safetensors   "<key>.latents" [C, F, h, w], "<key>.text" [L, D]: the rows of the caption's tokens
    prepared/empty_text.safetensors     "text": the rows of the empty caption, for caption dropout

A shard is on the disk before the index names it: a writer that was killed goes on from there, to the same bytes. What the
selection leaves out stays, so that it need not be made again. Where the reference pads text to 512 rows of mostly zeros, a
store holds the caption's own rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa_fast.weights.files import save

INDEX, SELECTION, SHARDS, EMPTY = "index.json", "selection.json", "shards", "empty_text.safetensors"
FORMAT, SELECTION_FORMAT = "pusa-fast latents 1", "pusa-fast selection 1"
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
    details: Mapping[str, Any] = field(
        default_factory=dict
    )  # hash of the file, first frame, fps ...; "latents": see `StoreWriter`


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the old one as it was, whatever stops the program or the machine."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        _to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a loss of power."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network disks do this for files alone
            raise
    finally:
        os.close(handle)


class LatentStore:
    """Reads a folder that `StoreWriter` or `pusa-fast prepare` wrote.

    `clips`: those that the last finished `prepare` named, in its order, or all of the index; `model`: what the latents and text were
    made with (`vae`, `text`: hashes; `channels`, `text_dim`, `text_len`). Raises FileNotFoundError, ValueError for a folder that is no
    store or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        clips, self.model = read_index(self.folder)
        self.clips = _selected(self.folder, clips)
        for shard, wrong in _unreadable(self.folder, self.clips).items():
            kind = ValueError if (self.folder / SHARDS / shard).exists() else FileNotFoundError
            raise kind(f"{self.folder}: shard {shard} {wrong}: prepare again, which makes its clips anew")

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
            raise ValueError(
                f"{self.folder} holds no empty caption, so captions cannot be dropped: prepare again, or set caption_dropout to 0"
            )
        return self._padded(_open(path).get_tensor("text"))

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(self.text_len - len(rows), rows.shape[1])])

    def _tensor(self, index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        clip = self.clips[index]
        path = self.folder / SHARDS / clip.shard
        try:
            tensor: Tensor = _open(path).get_tensor(f"{clip.key}.{name}")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): prepare again, which makes its clips anew") from error
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{path}: {name} of {clip.source} is {list(tensor.shape)}, the index says {list(shape)}")
        return tensor


class StoreWriter:
    """Adds clips to a store, new or begun. `keys`: the clips that it already holds; `model`: as `LatentStore.model`.

    A context manager: leaving it without an error writes the last, shorter shard. After an error or a kill the store holds
    the complete shards. Clips whose shard cannot be read count as not there (see `lost_clips`). Raises ValueError where the folder
    holds clips of another model. `details["latents"]` of a clip names what its latents, whatever the caption, were made from.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: Mapping[str, Any], shard_clips: int = SHARD_CLIPS
    ) -> None:
        if shard_clips < 1:
            raise ValueError(f"a shard holds at least 1 clip, got {shard_clips}")
        self.folder, self.model, self.shard_clips = Path(folder), dict(model), shard_clips
        self._clips: list[StoredClip] = []
        if (self.folder / INDEX).exists():
            clips, found = read_index(self.folder)
            if differing := sorted(k for k in found.keys() | self.model.keys() if found.get(k) != self.model.get(k)):
                raise ValueError(
                    f"{self.folder} holds clips of another model ({differing[0]}: {found.get(differing[0])}, now "
                    f"{self.model.get(differing[0])}): choose another folder"
                )
            lost = lost_clips(self.folder)
            self._clips = [clip for clip in clips if clip.key not in lost]
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self.keys = {clip.key for clip in self._clips}
        self._sources = {str(clip.details["latents"]): clip for clip in self._clips if "latents" in clip.details}
        self._waiting: list[tuple[StoredClip, dict[str, Tensor]]] = []
        self._shard = self._next_shard()

    @property
    def latents_made(self) -> set[str]:
        """All `details["latents"]`: what `latents_of` finds."""
        return set(self._sources)

    def latents_of(self, made_from: str) -> Tensor | None:
        """Latents [C, F, h, w], as stored, of a clip with this `details["latents"]`; None where there is none."""
        clip = self._sources.get(made_from)
        if clip is None:
            return None
        name = f"{clip.key}.latents"
        waiting = next((tensors[name] for other, tensors in self._waiting if other is clip), None)
        found: Tensor = _open(self.folder / SHARDS / clip.shard).get_tensor(name) if waiting is None else waiting
        return found.clone()  # a shard may not hold one piece of memory under two names

    def write_empty_text(self, rows: Tensor) -> None:
        """Rows [L, D] of the empty caption."""
        save(self.folder / EMPTY, {"text": rows})
        _to_disk(self.folder / EMPTY)

    def add(
        self,
        key: str,
        latents: Tensor,
        text: Tensor,
        *,
        source: str,
        caption: str,
        details: Mapping[str, Any] | None = None,
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
        clip = StoredClip(key, source, caption, (C, F, h, w), len(text), self._shard, dict(details or {}))
        tensors = {f"{key}.latents": latents, f"{key}.text": text}
        self._waiting.append((clip, tensors))
        self.keys.add(key)
        if "latents" in clip.details:
            self._sources.setdefault(str(clip.details["latents"]), clip)
        if len(self._waiting) == self.shard_clips:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard, then the index that names it."""
        if not self._waiting:
            return
        path = self.folder / SHARDS / self._shard
        save(path, {n: t for _, tensors in self._waiting for n, t in tensors.items()})
        _to_disk(path)
        _to_disk(path.parent)
        self._clips += [clip for clip, _ in self._waiting]
        self._waiting.clear()
        _write_index(self.folder, self.model, self._clips)
        self._shard = self._next_shard()

    def _next_shard(self) -> str:
        """The first number that is free: that of a shard that was lost, or the next."""
        taken = {clip.shard for clip in self._clips}
        return next(name for i in count() if (name := f"{i:05d}.safetensors") not in taken)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
            if not (self.folder / INDEX).exists():
                _write_index(self.folder, self.model, self._clips)


def lost_clips(folder: Path) -> dict[str, str]:
    """Keys of clips whose shard cannot be read, each with its shard and what is wrong with that.

    The index goes on naming them until others take their place. Raises FileNotFoundError where no shard at all is there, which is
    more likely a folder that was moved than so much damage.
    """
    clips, _ = read_index(folder)
    wrong = _unreadable(folder, clips)
    shards = {clip.shard for clip in clips}
    if shards and not any((folder / SHARDS / shard).exists() for shard in shards):
        raise FileNotFoundError(
            f"{folder / SHARDS} holds none of {len(shards)} shards: bring them back, or delete {folder / INDEX} to make all clips anew"
        )
    return {clip.key: f"{clip.shard} {wrong[clip.shard]}" for clip in clips if clip.shard in wrong}


def damage(path: Path, names: Iterable[str] = ()) -> str | None:
    """What is wrong with a safetensors file, of which header and size are read; None where it is whole and holds `names`.

    Raises OSError for a file that is there and cannot be opened: that may pass.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return "is missing"
    try:
        held = set(_open(path).keys())
    except ValueError as error:
        return f"is damaged ({error.__cause__})"
    lacking = next((name for name in names if name not in held), None)
    return None if lacking is None else f"is another's (it holds no {lacking})"


def _unreadable(folder: Path, clips: Iterable[StoredClip]) -> dict[str, str]:
    """Shards of `clips` that cannot be read, each with what is wrong."""
    names: dict[str, list[str]] = {}
    for clip in clips:
        names.setdefault(clip.shard, []).extend((f"{clip.key}.latents", f"{clip.key}.text"))
    found = {shard: damage(folder / SHARDS / shard, own) for shard, own in names.items()}
    return {shard: wrong for shard, wrong in found.items() if wrong is not None}


def write_selection(folder: Path, keys: Sequence[str]) -> None:
    """Name the clips, by their keys and in this order, that a `LatentStore` of the folder shows."""
    path, lines = folder / SELECTION, ",\n".join(map(json.dumps, keys))
    text = f'{{"format": "{SELECTION_FORMAT}", "clips": [\n{lines}\n]}}\n'
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_selection(folder: Path) -> list[str] | None:
    """The keys that `write_selection` wrote; None where there are none. Raises ValueError for a damaged file."""
    path = folder / SELECTION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != SELECTION_FORMAT:
            raise ValueError(f"format {found['format']!r} instead of {SELECTION_FORMAT!r}")
        return [str(key) for key in found["clips"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another program ({error}): prepare again, without --add") from error


def _selected(folder: Path, clips: tuple[StoredClip, ...]) -> tuple[StoredClip, ...]:
    keys = read_selection(folder)
    if keys is None:
        return clips
    if not keys:
        raise ValueError(f"{folder} is not ready: no prepare of it has come to its end; start the same prepare again")
    held = {clip.key: clip for clip in clips}
    if lacking := sum(key not in held for key in keys):
        raise ValueError(
            f"{folder} lacks {lacking} of its {len(keys)} clips, whose shards were lost: prepare again, which makes them anew"
        )
    return tuple(held[key] for key in keys)


def _write_index(folder: Path, model: Mapping[str, Any], clips: Iterable[StoredClip]) -> None:
    # By shard: a shard that was lost and made again comes back to its place.
    entries = [asdict(clip) for clip in sorted(clips, key=lambda clip: (len(clip.shard), clip.shard))]
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    head = json.dumps({"format": FORMAT, "model": model}, sort_keys=True)[:-1]
    write_text(folder / INDEX, f'{head}, "clips": [\n{lines}\n]}}\n')


def read_index(folder: Path) -> tuple[tuple[StoredClip, ...], dict[str, Any]]:
    """Every clip of a store, whether selected or not, and its model. Raises FileNotFoundError, ValueError."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no prepared clips (no {INDEX}): run pusa-fast prepare SOURCE --out {folder}"
        )
    names = [f.name for f in fields(StoredClip)]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r} instead of {FORMAT!r}")
        clips = tuple(
            StoredClip(**{n: entry[n] for n in names} | {"shape": tuple(entry["shape"])}) for entry in found["clips"]
        )
        return clips, dict(found["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or of another program ({error}): restore it, or delete it and prepare again"
        ) from error


@lru_cache(maxsize=64)
def _handle(path: Path, changed: int, size: int) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _open(path: Path) -> Any:
    status = path.stat()
    try:
        return _handle(path, status.st_mtime_ns, status.st_size)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare again, which makes it anew") from error
