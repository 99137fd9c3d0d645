"""Shards that cannot be read: their clips are made again, unless the shards are only away."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from films import SMALL, cut_off, hashes, is_answered, run, trained_on, write_csv
from pusa_fast import WanDiT, cli
from pusa_fast.data.prepare import prepare
from pusa_fast.data.store import EMPTY, SELECTION, SHARDS, LatentStore, StoreWriter, read_index

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda path: cut_off(path, 0), "header too small"),
    "header cut": (lambda path: cut_off(path, 40), "is damaged"),
    "data cut": (lambda path: cut_off(path, -1), "not fully covered"),
    "another's": (lambda path: shutil.copy(path.with_name("00000.safetensors"), path), "is another's"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_shards_that_cannot_be_read_are_made_anew(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    change, said = DAMAGES[name]
    write_csv(here / "l.csv", *(f"films/{film}.mp4,caption {i}" for i in range(3) for film in "ab"))
    words = ["l.csv", "--out", "out", "--bucket", "32x32x1", "--shard-clips", "2"]
    assert run(*words).exit_code == 0
    before = hashes(here / "out")
    change(here / "out" / SHARDS / "00001.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(WanDiT, "__init__", lambda *words, **named: pytest.fail("the model was loaded"))
        trained = CliRunner().invoke(cli.app, ["train", "--set", "data.path=out", "--set", "out=run"])
    is_answered(trained, ["out: shard 00001.safetensors", said, "prepare again"])
    result = run(*words)
    assert result.exit_code == 0, result.output
    note, counts = result.stderr.splitlines()
    assert (
        note.startswith("note: shard 00001.safetensors is ")
        and said in note
        and note.endswith(": 2 clips are made again")
    )
    assert counts == "6 clips in out (2 new): 6 of 32x32x1"
    assert hashes(here / "out") == before


def test_stopped_while_lost_clips_are_made_anew(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(here / "l.csv", *(f"films/a.mp4,caption {i}" for i in range(5)))
    size: dict[str, Any] = {"buckets": ["32x32x1"], "shard_clips": 1}
    prepare("l.csv", "out", **size)
    before = hashes(here / "out")
    for shard in ("00001", "00003"):
        (here / "out" / SHARDS / f"{shard}.safetensors").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "pusa_fast.data.encoding.load_vae", lambda *words, **named: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        prepare("l.csv", "out", **size)
    with pytest.raises(FileNotFoundError, match=r"out: shard 00001\.safetensors is missing: prepare again"):
        LatentStore("out")
    real, made = StoreWriter.flush, list[str]()

    def first_only(self: StoreWriter) -> None:
        real(self)
        made.append("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "flush", first_only)
        prepare("l.csv", "out", **size)
    assert made == [""]
    with pytest.raises(ValueError, match="out lacks 1 of its 5 clips, whose shards were lost: prepare again"):
        LatentStore("out")
    assert prepare("l.csv", "out", **size).new == 1
    assert hashes(here / "out") == before


def test_shards_that_are_away_are_not_lost(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is not mounted, or a system that has no file handles left, destroys nothing."""
    write_csv(here / "l.csv", *(f"films/a.mp4,caption {i}" for i in range(3)))
    size: dict[str, Any] = {"buckets": ["32x32x1"], "shard_clips": 1}
    prepare("l.csv", "out", **size)
    before = hashes(here / "out")
    (here / "out" / SHARDS).rename(here / "away")
    with pytest.raises(
        FileNotFoundError, match=r"shards holds none of 3 shards: bring them back, or delete out/index\.json"
    ):
        prepare("l.csv", "out", **size)
    (here / "away").rename(here / "out" / SHARDS)
    real = Path.open

    def busy(self: Path, *words: Any, **named: Any) -> Any:
        if self.suffix == ".safetensors" and self.parent.name == SHARDS:
            raise OSError(errno.EMFILE, "Too many open files", str(self))
        return real(self, *words, **named)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(Path, "open", busy)
        prepare("l.csv", "out", **size)
    assert hashes(here / "out") == before and prepare("l.csv", "out", **size).new == 0


def test_a_folder_without_a_selection_shows_what_it_had_until_prepare_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(here / "l.csv", "films/a.mp4,x")
    prepare("l.csv", "out", buckets=SMALL)
    (here / "out" / SELECTION).unlink()
    write_csv(here / "l.csv", "films/b.mp4,y")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pusa_fast.data.prepare.write_sheet", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare("l.csv", "out", buckets=SMALL)
    assert len(read_index(here / "out")[0]) == 2 and trained_on("out") == [("films/a.mp4", "x")]
    prepare("l.csv", "out", buckets=SMALL)
    assert trained_on("out") == [("films/b.mp4", "y")]


def test_lost_clips_of_other_lists_are_gone(here: Path) -> None:
    for name in "ab":
        write_csv(here / f"{name}.csv", f"films/{name}.mp4,x")
        prepare(f"{name}.csv", "out", buckets=SMALL, add=True)
    for shard in (here / "out" / SHARDS).iterdir():
        cut_off(shard, 100)
    cut_off(here / "out" / EMPTY, 0)
    (note,) = prepare("b.csv", "out", buckets=SMALL, add=True).notes
    assert (
        note.startswith("shard 00000.safetensors is damaged")
        and ", and 1 more shards cannot be read: 1 clips are made again, 1 of other" in note
    )
    assert trained_on("out") == [("films/b.mp4", "x")] and torch.isfinite(LatentStore("out").empty_text).all()
    cut_off(here / "out" / EMPTY, 0)
    assert prepare("b.csv", "out", buckets=SMALL).new == 0
    assert torch.isfinite(LatentStore("out").empty_text).all()
