"""A store that commit 640e6fd wrote (see tests/written_by_640e6fd/make.py): read, taken for what it
is, and continued.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pusa_fast.data.prepare import REPORT, prepare
from pusa_fast.data.store import EMPTY, INDEX, SELECTION, SHARDS, LatentStore

WRITTEN = Path(__file__).parents[1] / "written_by_640e6fd"
SETTINGS: dict[str, Any] = {
    "buckets": ["16x16x5", "16x16x1"], "clips_per_video": 2, "device": "cpu", "shard_clips": 4,
}  # fmt: skip
CLIPS = ["red.mp4", "red.mp4", "grey.png", "green.mp4", "green.mp4", "blue.png"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("clips", "store"):
        shutil.copytree(WRITTEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """What training depends on, by file."""
    kept = (INDEX, SELECTION, EMPTY, REPORT, SHARDS)
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).parts[0] in kept
    }


def test_it_is_read(here: Path) -> None:
    store = LatentStore("store")
    assert [clip.source for clip in store.clips] == CLIPS
    assert store.clips[0].caption == "a bar on red" and store.text_len == 24
    for number, clip in enumerate(store.clips):
        assert clip.shape == (16, 1 if clip.source.endswith(".png") else 2, 2, 2)
        assert store.latents(number).dtype is torch.bfloat16 and store.latents(number).shape == clip.shape
        assert store.text(number).shape == (24, 64) and store.text(number)[: clip.tokens].abs().amax(1).min() > 0
    assert store.empty_text.shape == (24, 64)
    assert store.fingerprint == "05f6a636ef348eef92f2e70725285ce2f49e650ba899a213f52bf59aabb4b675"  # runs refer to it


def test_the_same_prepare_changes_nothing(here: Path) -> None:
    before = contents(Path("store"))
    report = prepare("clips", "store", **SETTINGS)
    assert (report.clips, report.new) == (6, 0)
    assert contents(Path("store")) == before


def test_more_clips_join_those_that_it_holds(here: Path) -> None:
    """Latents of a film under another caption are copied; what was there is neither made again nor
    moved.
    """
    before = contents(Path("store"))
    with Path("clips", "metadata.csv").open("a") as file:
        file.write("red.mp4,a bar moves on red\n")
    report = prepare("clips", "store", **SETTINGS)
    assert (report.clips, report.new) == (8, 2)
    after, store = contents(Path("store")), LatentStore("store")
    assert {name: after[name] for name in before if name.startswith(SHARDS)} == {
        name: data for name, data in before.items() if name.startswith(SHARDS)
    }
    assert [clip.source for clip in store.clips] == [*CLIPS, "red.mp4", "red.mp4"]
    assert all(torch.equal(store.latents(i), store.latents(6 + i)) for i in range(2))
    old, new = (json.loads(files[INDEX])["clips"] for files in (before, after))
    assert new[: len(old)] == old
