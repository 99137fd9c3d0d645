"""Hashes and sizes of files, kept in a prepared folder so that unchanged files are not read again.

A file counts as unchanged while its path, size and time of change are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pusa_fast.data.buckets import measure
from pusa_fast.data.durable import write_text
from pusa_fast.weights.files import file_hash

FORMAT, FILES = "pusa-fast files 1", "files.json"  # the name in a prepared folder


class Catalog:
    """Hashes and sizes of files, kept in the file `path`. One that is damaged is started over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, dict[str, Any]] = {}
        self._new = 0
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] == FORMAT:
                self._files = {str(name): dict(entry) for name, entry in found["files"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            pass  # it only saves work

    def hash(self, path: Path) -> str:
        """sha256 of a file; of a folder of PNGs, that of their names and hashes. Raises OSError."""
        entry = self._entry(path)
        if "sha256" not in entry:
            entry["sha256"] = digest((p.name, file_hash(p)) for p in _pngs(path)) if path.is_dir() else file_hash(path)
            self._new += 1
        return str(entry["sha256"])

    def measure(self, path: Path, fps: float | None) -> tuple[int, int, int]:
        """As `buckets.measure`."""
        seen = self._entry(path).setdefault("seen", {})
        rate = "own" if fps is None else str(float(fps))
        if rate not in seen:
            seen[rate] = list(measure(path, fps))
            self._new += 1
        width, height, frames = seen[rate]
        return width, height, frames

    def save(self, least: int = 1) -> None:
        """Write the file, if it lacks at least `least` facts."""
        if self._new >= least:
            entries = sorted(self._files.items())
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in entries)
            write_text(self.path, f'{{"format": "{FORMAT}", "files": {{\n{lines}\n}}}}\n')
            self._new = 0

    def _entry(self, path: Path) -> dict[str, Any]:
        name, stamp = str(path.absolute()), _stamp(path)
        if self._files.get(name, {}).get("stamp") != stamp:
            self._files[name] = {"stamp": stamp}
        return self._files[name]


def _stamp(path: Path) -> str:
    if path.is_dir():
        return digest((p.name, _stamp(p)) for p in _pngs(path))
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _pngs(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith("."))


def digest(parts: Iterable[object]) -> str:
    """sha256 of a list of values, as JSON."""
    return hashlib.sha256(json.dumps(list(parts), ensure_ascii=True).encode()).hexdigest()
