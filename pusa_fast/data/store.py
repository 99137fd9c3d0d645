"""Clips as the trainer reads them: latents and text rows in sharded safetensors, with an index.

    index.json                 the models that made the clips, and an entry per clip
    selection.json             clips that training sees, in order: none before prepare has finished
    shards/00000.safetensors   "<key>.latents" [C, F, h, w], "<key>.text" [L, D]: a caption's rows
    empty_text.safetensors     "text": the rows of the empty caption, for caption dropout

Without a selection, training sees all clips. Clips that it leaves out stay, so that they need not
be made again. A shard is on the disk before the index names it: a writer that was killed goes on
from there, to the same bytes. Where the reference pads text to 512 rows, most of them zero, a store
holds the caption's own rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa_fast.data.durable import to_disk, write_text
from pusa_fast.weights.files import save

INDEX, SELECTION, SHARDS, EMPTY = "index.json", "selection.json", "shards", "empty_text.safetensors"
FORMAT, SELECTION_FORMAT = "pusa-fast latents 1", "pusa-fast selection 1"
SHARD_CLIPS = 64


@dataclass(frozen=True)
class StoredClip:
    """One clip. `key`: hash of everything it was made from; `source`: its name for people.

    `details`: hash of the file, first frame, fps ...; "latents": see `StoreWriter`.
    """

    key: str
    source: str
    caption: str
    shape: tuple[int, int, int, int]  # C, F, h, w
    tokens: int  # rows of text
    shard: str
    details: Mapping[str, Any] = field(default_factory=dict)


class LatentStore:
    """Reads a folder that `StoreWriter` or `pusa-fast prepare` wrote.

    `clips`: those that the last finished `prepare` selected, in its order, or all of the index;
    `model`: what the latents and text were made with (`vae`, `text`: hashes; `channels`,
    `text_dim`, `text_len`). Raises FileNotFoundError, or ValueError for a folder that is damaged or
    not a store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        clips, self.model = read_index(self.folder)
        self.clips = _selected(self.folder, clips)
        for shard, wrong in _unreadable(self.folder, self.clips).items():
            kind = ValueError if (self.folder / SHARDS / shard).exists() else FileNotFoundError
            raise kind(f"{self.folder}: shard {shard} {wrong}: prepare again to restore its clips")

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def text_len(self) -> int:
        return int(self.model["text_len"])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the contents: which clips, in which order, made with which model."""
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
            missing = f"{self.folder} holds no empty caption, so captions cannot be dropped"
            raise ValueError(f"{missing}: prepare again, or set caption_dropout to 0")
        return self._padded(_open(path).get_tensor("text"))

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(self.text_len - len(rows), rows.shape[1])])

    def _tensor(self, index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        clip = self.clips[index]
        path = self.folder / SHARDS / clip.shard
        try:
            tensor: Tensor = _open(path).get_tensor(f"{clip.key}.{name}")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): prepare again to restore its clips") from error
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{path}: {name} of {clip.source} is {list(tensor.shape)}, the index says {list(shape)}")
        return tensor


class StoreWriter:
    """Adds clips to a store, new or existing. `keys`: the clips that it holds.

    `model`: as `LatentStore.model`. A context manager: leaving it without an error writes the last,
    shorter shard. After an error or a kill the store holds the complete shards. Clips whose shard
    cannot be read count as missing (see `lost_clips`). `details["latents"]` of a clip is a hash of
    everything its latents were made from, which the caption is not. Raises ValueError where the
    folder holds clips of another model.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: Mapping[str, Any], shard_clips: int = SHARD_CLIPS
    ) -> None:
        if shard_clips < 1:
            raise ValueError(f"a shard holds at least 1 clip, got {shard_clips}")
        self.folder, self.model, self.shard_clips = Path(folder), dict(model), shard_clips
        if (self.folder / INDEX).exists():
            check_model(self.folder, self.model)
        self._clips = list(readable_clips(self.folder).values())
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self.keys = {clip.key for clip in self._clips}
        self._sources = {str(clip.details["latents"]): clip for clip in self._clips if "latents" in clip.details}
        self._waiting: dict[str, Tensor] = {}  # of clips that are not in a shard yet
        self._shard = self._next_shard()

    @property
    def latents_made(self) -> set[str]:
        """Every `details["latents"]` that `latents_of` finds."""
        return set(self._sources)

    def latents_of(self, made_from: str) -> Tensor | None:
        """Latents [C, F, h, w] as stored, by `details["latents"]`; None if no clip has them."""
        if (clip := self._sources.get(made_from)) is None:
            return None
        name = f"{clip.key}.latents"
        found: Tensor | None = self._waiting.get(name)
        if found is None:
            found = _open(self.folder / SHARDS / clip.shard).get_tensor(name)
        return found.clone()  # a shard must not hold the same memory under two names

    def write_empty_text(self, rows: Tensor) -> None:
        """Rows [L, D] of the empty caption."""
        save(self.folder / EMPTY, {"text": rows})
        to_disk(self.folder / EMPTY)

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
        """latents [C, F, h, w]; text [L, D], L at most text_len.

        Raises ValueError for other shapes, or a key that the store holds.
        """
        channels, width, most = (int(self.model[k]) for k in ("channels", "text_dim", "text_len"))
        if latents.ndim != 4 or latents.shape[0] != channels:
            raise ValueError(f"{source}: latents must be [{channels}, F, h, w], got {list(latents.shape)}")
        if text.ndim != 2 or text.shape[1] != width or not 1 <= len(text) <= most:
            raise ValueError(f"{source}: text must be [1..{most}, {width}], got {list(text.shape)}")
        if key in self.keys:
            raise ValueError(f"{source}: this clip is in {self.folder} already")
        C, F, h, w = latents.shape
        clip = StoredClip(key, source, caption, (C, F, h, w), len(text), self._shard, dict(details or {}))
        self._waiting |= {f"{key}.latents": latents, f"{key}.text": text}
        self._clips.append(clip)
        self.keys.add(key)
        if "latents" in clip.details:
            self._sources.setdefault(str(clip.details["latents"]), clip)
        if len(self._waiting) == 2 * self.shard_clips:
            self.flush()

    def flush(self) -> None:
        """Write the waiting clips as a shard, then the index that names it."""
        if not self._waiting:
            return
        path = self.folder / SHARDS / self._shard
        save(path, self._waiting)
        to_disk(path)
        to_disk(path.parent)
        self._waiting.clear()
        _write_index(self.folder, self.model, self._clips)
        self._shard = self._next_shard()

    def _next_shard(self) -> str:
        """The first free number: that of a lost shard, or the next one."""
        taken = {clip.shard for clip in self._clips}
        return next(name for i in count() if (name := f"{i:05d}.safetensors") not in taken)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
            if not (self.folder / INDEX).exists():
                _write_index(self.folder, self.model, self._clips)


def check_model(folder: Path, model: Mapping[str, Any]) -> None:
    """Raises ValueError where the store in `folder` was made with another model than this."""
    _, found = read_index(folder)
    if differing := sorted(name for name in found.keys() | model.keys() if found.get(name) != model.get(name)):
        then, now = found.get(differing[0]), model.get(differing[0])
        other = f"clips of another model ({differing[0]}: {then}, now {now})"
        raise ValueError(f"{folder} holds {other}: choose another folder")


def readable_clips(folder: Path) -> dict[str, StoredClip]:
    """Clips of a store by key, selected or not, without the lost ones. Empty without an index."""
    if not (folder / INDEX).exists():
        return {}
    lost = lost_clips(folder)
    return {clip.key: clip for clip in read_index(folder)[0] if clip.key not in lost}


def lost_clips(folder: Path) -> dict[str, str]:
    """Keys of clips whose shard cannot be read, each with the shard and what is wrong with it.

    The index goes on naming them until others take their place. Raises FileNotFoundError where
    every shard is missing: that is more likely a folder that was moved than damage.
    """
    clips, _ = read_index(folder)
    wrong = _unreadable(folder, clips)
    shards = {clip.shard for clip in clips}
    if shards and not any((folder / SHARDS / shard).exists() for shard in shards):
        mend = f"bring them back, or delete {folder / INDEX} to start over"
        raise FileNotFoundError(f"{folder / SHARDS} holds none of {len(shards)} shards: {mend}")
    return {clip.key: f"{clip.shard} {wrong[clip.shard]}" for clip in clips if clip.shard in wrong}


def damage(path: Path, names: Iterable[str] = ()) -> str | None:
    """What is wrong with a safetensors file; None where it is whole and holds `names`.

    Reads its header and size. Raises OSError for a file that cannot be opened: that may pass.
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
    """Shards of `clips` that cannot be read, and why."""
    names: dict[str, list[str]] = {}
    for clip in clips:
        names.setdefault(clip.shard, []).extend((f"{clip.key}.latents", f"{clip.key}.text"))
    found = {shard: damage(folder / SHARDS / shard, own) for shard, own in names.items()}
    return {shard: wrong for shard, wrong in found.items() if wrong is not None}


def write_selection(folder: Path, keys: Sequence[str]) -> None:
    """Choose the clips that a `LatentStore` of the folder shows, by key, in this order."""
    path, lines = folder / SELECTION, ",\n".join(map(json.dumps, keys))
    text = f'{{"format": "{SELECTION_FORMAT}", "clips": [\n{lines}\n]}}\n'
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_selection(folder: Path) -> list[str] | None:
    """The keys in selection.json; None without one. Raises ValueError where it is damaged."""
    path = folder / SELECTION
    if not path.is_file():
        return None
    with _understood(path, "prepare again, without --add"):
        return [str(key) for key in _read_json(path, SELECTION_FORMAT)["clips"]]


def _selected(folder: Path, clips: tuple[StoredClip, ...]) -> tuple[StoredClip, ...]:
    keys = read_selection(folder)
    if keys is None:
        return clips
    if not keys:
        raise ValueError(f"{folder} is not ready: no prepare of it has finished; start the same prepare again")
    held = {clip.key: clip for clip in clips}
    if lacking := sum(key not in held for key in keys):
        lost = f"{folder} lacks {lacking} of its {len(keys)} clips, whose shards were lost"
        raise ValueError(f"{lost}: prepare again to restore them")
    return tuple(held[key] for key in keys)


def _write_index(folder: Path, model: Mapping[str, Any], clips: Iterable[StoredClip]) -> None:
    # By shard: one that was lost and made again returns to its place.
    entries = [asdict(clip) for clip in sorted(clips, key=lambda clip: (len(clip.shard), clip.shard))]
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    head = json.dumps({"format": FORMAT, "model": model}, sort_keys=True)[:-1]
    write_text(folder / INDEX, f'{head}, "clips": [\n{lines}\n]}}\n')


def read_index(folder: Path) -> tuple[tuple[StoredClip, ...], dict[str, Any]]:
    """Every clip, selected or not, and the model. Raises FileNotFoundError, ValueError."""
    path = folder / INDEX
    if not path.is_file():
        mend = f"run pusa-fast prepare SOURCE --out {folder}"
        raise FileNotFoundError(f"{folder} holds no prepared clips (no {INDEX}): {mend}")
    names = [f.name for f in fields(StoredClip)]
    with _understood(path, "restore it, or delete it and prepare again"):
        found = _read_json(path, FORMAT)
        entries = ({n: entry[n] for n in names} | {"shape": tuple(entry["shape"])} for entry in found["clips"])
        return tuple(StoredClip(**entry) for entry in entries), dict(found["model"])


def _read_json(path: Path, form: str) -> Any:
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["format"] != form:
        raise ValueError(f"format {found['format']!r} instead of {form!r}")
    return found


@contextmanager
def _understood(path: Path, mend: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another program ({error}): {mend}") from error


@lru_cache(maxsize=64)
def _handle(path: Path, changed: int, size: int) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _open(path: Path) -> Any:
    status = path.stat()
    try:
        return _handle(path, status.st_mtime_ns, status.st_size)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare again to restore it") from error
