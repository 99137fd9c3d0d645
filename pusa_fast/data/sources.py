"""The clips and captions that `pusa-fast prepare` is given, checked before anything is decoded.

    metadata.csv     columns file_name,text; files are relative to its folder, or to train/ in it
    anything.jsonl   an object per line: file_name, video or path; text, caption or prompt
    a folder         with metadata.csv or metadata.jsonl; else of videos and pictures, each with
                     its caption in a .txt of its name

An error in the list itself raises; an error in one clip is its `problem`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa_fast.media import PICTURE_SUFFIXES

TENSORS = ".tensors.pth"  # follows the name of a file that the reference has prepared
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
)
LISTS = ("metadata.csv", "metadata.jsonl")
_PATH_KEYS, _TEXT_KEYS = ("file_name", "video", "path"), ("text", "caption", "prompt")


@dataclass(frozen=True)
class Source:
    """One file to prepare. `name`: as in the list; `tensors`: the reference's latents to use.

    `problem`: why it cannot be used, None so far as it can; then `path` is where it was looked for.
    """

    name: str
    path: Path
    caption: str
    tensors: Path | None = None
    problem: str | None = None


def read_sources(source: str | os.PathLike[str], tensors: bool = True) -> list[Source]:
    """Every entry of SOURCE in order; `tensors`: use the reference's .tensors.pth files.

    Raises FileNotFoundError; ValueError with file and line for a list that cannot be understood, is
    empty, or where no entry can be used.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a metadata.csv, a .jsonl file or a folder of clips")
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()]
        if len(lists) > 1:
            raise ValueError(f"{path} holds both {' and '.join(LISTS)}: name the one that counts")
        found = _read_list(lists[0], tensors) if lists else list(_read_folder(path, tensors))
    else:
        found = _read_list(path, tensors)
    if not found:
        raise ValueError(f"{path} names no clip: it needs at least one video or picture with a caption")
    bad = [entry for entry in found if entry.problem]
    if len(bad) == len(found):
        raise ValueError(f"{path}: none of {len(found)} clips can be used; the first, {bad[0].name}: {bad[0].problem}")
    return found


def _read_list(path: Path, tensors: bool) -> list[Source]:
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is not a list of clips: give a metadata.csv, a .jsonl file, or a folder of clips")
    text = _decoded(path)
    found = []
    for line, name, caption in readers[path.suffix.lower()](path, text):
        if not name.strip():
            raise ValueError(f"{path} line {line}: the file's name is empty: write a path, or delete the line")
        try:
            f"{name}{caption}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path} line {line}: {error.object[error.start]!r} is half a character: type the text again"
            ) from None
        found.append(_entry(path.parent, name.strip(), caption.strip(), tensors))
    return found


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = f"0x{data[error.start]:02x}"
        raise ValueError(f"{path} line {line}: byte {byte} is not UTF-8: save the file as UTF-8") from None


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        if missing := [name for name in ("file_name", "text") if name not in columns]:
            lacking, among = " and no column ".join(missing), ", ".join(columns) or "none"
            raise ValueError(
                f"{path} line 1: there is no column {lacking} among {among}: "
                "the first line must name the columns, file_name and text among them"
            )
        for row in reader:
            if row and len(row) != len(columns):
                raise ValueError(
                    f"{path} line {reader.line_num}: {len(row)} values for {len(columns)} columns ({row[0]!r} ...): "
                    "put a text with commas in double quotes"
                )
            if row:
                yield reader.line_num, row[columns.index("file_name")], row[columns.index("text")]
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}: check its quotes") from None


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: no valid JSON ({error}): write one object per line") from None
        if not isinstance(row, dict):
            needed = 'an object such as {"video": "a.mp4", "text": "..."}'
            raise ValueError(f"{path} line {number}: a {type(row).__name__} where {needed} is needed")
        yield number, _value(row, _PATH_KEYS, path, number), _value(row, _TEXT_KEYS, path, number)


def _value(row: dict[str, Any], keys: tuple[str, ...], path: Path, line: int) -> str:
    key = next((key for key in keys if key in row), None)
    if key is None:
        held = ", ".join(row) or "(none)"
        raise ValueError(f"{path} line {line}: none of {', '.join(keys)} among its keys {held}: add one")
    if row[key] is None and keys is _TEXT_KEYS:
        return ""  # a caption that is yet to be written, not a list of another kind
    if not isinstance(row[key], str):
        raise ValueError(f"{path} line {line}: {key}={row[key]!r} is not text: put it in quotes")
    return str(row[key])


def _read_folder(folder: Path, tensors: bool) -> Iterator[Source]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    videos = {entry.stem for entry in entries if entry.suffix.lower() in VIDEO_SUFFIXES}
    for entry in entries:
        caption_file = entry.with_name(entry.name + ".txt") if entry.is_dir() else entry.with_suffix(".txt")
        kind = entry.suffix.lower()
        # A picture with a video's name is its preview. A folder with a caption is a clip of PNGs.
        is_clip = kind in VIDEO_SUFFIXES or (kind in PICTURE_SUFFIXES and entry.stem not in videos)
        if not (caption_file.is_file() if entry.is_dir() else is_clip):
            continue
        caption, problem = "", None
        try:
            caption = caption_file.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            problem = f"has no caption: write {caption_file.name} next to it"
        except (OSError, UnicodeDecodeError) as error:
            problem = f"its caption {caption_file.name} cannot be read ({error}): save it as UTF-8"
        yield _entry(folder, entry.name, caption, tensors, problem)


def _entry(folder: Path, name: str, caption: str, tensors: bool, problem: str | None = None) -> Source:
    """The file of a list's entry, looked for in the list's folder and in its train/."""
    clip, pointed = name.removesuffix(TENSORS), name.endswith(TENSORS)
    places = [folder / clip, folder / "train" / clip]
    made = [place.with_name(place.name + TENSORS) for place in places] if tensors and Path(clip).name else []
    found = next((place for place in made if place.is_file()), None)
    path = next((place for place in places if place.exists()), places[0])
    if found is not None:
        path = found.with_name(found.name.removesuffix(TENSORS))
    elif not path.exists() or (pointed and tensors):
        looked = [str(place) + (TENSORS if pointed and tensors else "") for place in places]
        problem = problem or f"missing: looked for {' and '.join(dict.fromkeys(looked))}"
    if not caption:
        problem = problem or "its caption is empty: write what the clip shows"
    return Source(name, path, caption, found, problem)
