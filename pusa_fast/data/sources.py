"""What `pusa-fast prepare` is given: a list of clips with captions, read and checked before anything is decoded.

    metadata.csv     columns file_name,text; files relative to its folder, or in train/ beside it as the reference lays them out
    anything.jsonl   a JSON object a line: file_name, video or path; text, caption or prompt
    a folder         with metadata.csv or metadata.jsonl; else videos and pictures, each with its caption in a .txt of its name

What is wrong with the list itself raises; what is wrong with one clip is its `problem`.
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

TENSORS = ".tensors.pth"  # the reference's own prepared clip, beside the file it was made from
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
)
LISTS = ("metadata.csv", "metadata.jsonl")
_PATH_KEYS, _TEXT_KEYS = ("file_name", "video", "path"), ("text", "caption", "prompt")


@dataclass(frozen=True)
class Source:
    """One file to prepare. `name`: as the list writes it; `tensors`: the reference's latents of it, where they are to be used.

    `problem`: why it cannot be used, with `path` the place that was looked at; None where nothing is wrong so far.
    """

    name: str
    path: Path
    caption: str
    tensors: Path | None = None
    problem: str | None = None


def read_sources(source: str | os.PathLike[str], tensors: bool = True) -> list[Source]:
    """Every entry of SOURCE (see the module), in its order; `tensors`: use the reference's .tensors.pth files.

    Raises FileNotFoundError; ValueError naming file and line for a list that cannot be understood, holds nothing, or nothing usable.
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
        raise ValueError(f"{path} is no list of clips: give a metadata.csv, a .jsonl file, or a folder of clips")
    text = _decoded(path)
    found = []
    for line, name, caption in readers[path.suffix.lower()](path, text):
        if not name.strip():
            raise ValueError(f"{path} line {line}: the file's name is empty: write a path, or delete the line")
        try:
            f"{name}{caption}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path} line {line}: {error.object[error.start]!r} is half a character: write the text anew"
            ) from None
        found.append(_entry(path.parent, name.strip(), caption.strip(), tensors))
    return found


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        if missing := [name for name in ("file_name", "text") if name not in columns]:
            raise ValueError(
                f"{path} line 1: there is no column {' and no column '.join(missing)} among {', '.join(columns) or 'none'}: "
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
            raise ValueError(f"{path} line {number}: no valid JSON ({error}): write one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{path} line {number}: a {type(row).__name__} where an object such as {{"video": "a.mp4", "text": "..."}} is needed'
            )
        yield number, _value(row, _PATH_KEYS, path, number), _value(row, _TEXT_KEYS, path, number)


def _value(row: dict[str, Any], keys: tuple[str, ...], path: Path, line: int) -> str:
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise ValueError(
            f"{path} line {line}: none of {', '.join(keys)} among its keys {', '.join(row) or '(none)'}: add one"
        )
    if row[key] is None and keys is _TEXT_KEYS:
        return ""  # a caption that somebody has yet to write, not a list of another kind
    if not isinstance(row[key], str):
        raise ValueError(f"{path} line {line}: {key}={row[key]!r} is no text: put it in quotes")
    return str(row[key])


def _read_folder(folder: Path, tensors: bool) -> Iterator[Source]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    videos = {entry.stem for entry in entries if entry.suffix.lower() in VIDEO_SUFFIXES}
    for entry in entries:
        beside = entry.with_suffix(".txt") if not entry.is_dir() else entry.with_name(entry.name + ".txt")
        kind = entry.suffix.lower()
        # A picture with a video's name is its preview; a folder is a clip, of PNGs, where a caption says so.
        is_clip = kind in VIDEO_SUFFIXES or (kind in PICTURE_SUFFIXES and entry.stem not in videos)
        if not (beside.is_file() if entry.is_dir() else is_clip):
            continue
        caption, problem = "", None
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            problem = f"has no caption: write {beside.name} beside it"
        except (OSError, UnicodeDecodeError) as error:
            problem = f"its caption {beside.name} cannot be read ({error}): save it as UTF-8"
        yield _entry(folder, entry.name, caption, tensors, problem)


def _entry(folder: Path, name: str, caption: str, tensors: bool, problem: str | None = None) -> Source:
    """The file of a list's entry, looked for beside the list and in train/."""
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
