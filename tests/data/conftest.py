"""Films to prepare, and a folder to do it in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from films import frames_of
from pusa_fast import video


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for name, count, size in (("a", 9, (48, 32)), ("b", 12, (48, 32)), ("tall", 7, (32, 64)), ("short", 3, (48, 32))):
        video.write_video(folder / f"{name}.mp4", frames_of(count, seed=ord(name[0]), size=size), fps=8)
    data = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 3 // 4])
    Image.fromarray(frames_of(1, 3)[0].numpy()).save(folder / "still.png")
    return folder


@pytest.fixture
def here(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(films, folder / "films")
    monkeypatch.chdir(folder)
    return folder
