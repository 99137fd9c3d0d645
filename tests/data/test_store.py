"""Sharded latents: reading what was written, a killed writer that goes on, damage that is named."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from pusa_fast.data.store import (
    EMPTY,
    INDEX,
    SELECTION,
    SHARDS,
    LatentStore,
    StoreWriter,
    read_index,
    read_selection,
    write_selection,
    write_text,
)
from pusa_fast.testing import make_input

MODEL = {"vae": "v", "text": "t", "channels": 4, "text_dim": 6, "text_len": 5}


def _clip(i: int) -> dict[str, object]:
    return {
        "latents": make_input(4, 2, 3, 3, seed=i),
        "text": make_input(1 + i % 5, 6, seed=50 + i),
        "source": f"{i}.mp4",
        "caption": f"clip {i}",
    }


def _fill(folder: Path, start: int, stop: int, shard_clips: int = 3) -> None:
    with StoreWriter(folder, MODEL, shard_clips) as writer:
        writer.write_empty_text(torch.ones(1, 6))
        for i in range(start, stop):
            if f"{i:03d}" not in writer.keys:
                writer.add(f"{i:03d}", **_clip(i))  # type: ignore[arg-type]


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _fill(tmp_path, 0, 8)
    store = LatentStore(tmp_path)
    assert len(store) == 8 and len(list((tmp_path / SHARDS).iterdir())) == 3
    for i in range(8):
        clip = _clip(i)
        assert torch.equal(store.latents(i), clip["latents"])  # type: ignore[arg-type]
        rows = store.text(i)
        assert rows.shape == (5, 6) and torch.equal(rows[: 1 + i % 5], clip["text"])  # type: ignore[arg-type]
        assert not rows[1 + i % 5 :].any()
        assert (store.clips[i].source, store.clips[i].caption) == (f"{i}.mp4", f"clip {i}")
    assert torch.equal(store.empty_text[0], torch.ones(6)) and not store.empty_text[1:].any()


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    _fill(tmp_path / "whole", 0, 8)
    writer = StoreWriter(tmp_path / "killed", MODEL, 3)
    writer.write_empty_text(torch.ones(1, 6))
    for i in range(5):
        writer.add(f"{i:03d}", **_clip(i))  # type: ignore[arg-type]
    del writer  # killed: two clips waited
    assert len(LatentStore(tmp_path / "killed")) == 3
    _fill(tmp_path / "killed", 0, 8)
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")


def test_more_clips_go_into_new_shards_and_change_the_fingerprint(tmp_path: Path) -> None:
    _fill(tmp_path, 0, 4)
    before, first = _hashes(tmp_path), LatentStore(tmp_path).fingerprint
    assert LatentStore(tmp_path).fingerprint == first
    _fill(tmp_path, 0, 6)
    after = _hashes(tmp_path)
    assert all(after[name] == before[name] for name in before if name.startswith(SHARDS))
    assert LatentStore(tmp_path).fingerprint != first and len(LatentStore(tmp_path)) == 6


def test_an_error_leaves_complete_shards_and_no_temporary_files(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, MODEL, 3) as writer:
        for i in range(4):
            writer.add(f"{i:03d}", **_clip(i))  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert len(LatentStore(tmp_path)) == 3
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"index.json", "00000.safetensors"}


def test_a_selection_is_all_that_a_store_shows(tmp_path: Path) -> None:
    _fill(tmp_path, 0, 5)
    everything = LatentStore(tmp_path).fingerprint
    write_selection(tmp_path, ["003", "001"])
    store = LatentStore(tmp_path)
    assert [clip.key for clip in store.clips] == read_selection(tmp_path) == ["003", "001"] and len(store) == 2
    assert torch.equal(store.latents(0), _clip(3)["latents"])  # type: ignore[arg-type]
    chosen = store.fingerprint
    _fill(tmp_path, 0, 8)  # a writer changes nothing of it
    assert LatentStore(tmp_path).fingerprint == chosen != everything
    assert len(read_index(tmp_path)[0]) == 8
    write_selection(tmp_path, ["001", "003"])
    assert LatentStore(tmp_path).fingerprint != chosen, "the order is that of the last clips, which are held out"
    (tmp_path / SHARDS / "00002.safetensors").unlink()  # holds neither
    assert len(LatentStore(tmp_path)) == 2
    write_selection(tmp_path, ["001", "none"])
    with pytest.raises(ValueError, match=r"lacks 1 of its 2 clips.*prepare again"):
        LatentStore(tmp_path)
    for text in ("{", "[]", '{"format": "other", "clips": []}', '{"format": "pusa-fast selection 1", "clips": 3}'):
        (tmp_path / SELECTION).write_text(text)
        with pytest.raises(ValueError, match=r"selection\.json is damaged.*prepare again, without --add"):
            LatentStore(tmp_path)


def test_a_writer_makes_lost_shards_anew_in_their_place(tmp_path: Path) -> None:
    _fill(tmp_path, 0, 8)
    before = _hashes(tmp_path)
    (tmp_path / SHARDS / "00000.safetensors").unlink()
    (tmp_path / SHARDS / "00001.safetensors").write_bytes(b"")
    with StoreWriter(tmp_path, MODEL, 3) as writer:
        assert writer.keys == {"006", "007"}
    with pytest.raises(FileNotFoundError, match=r"shard 00000\.safetensors is missing: prepare again"):
        LatentStore(tmp_path)
    _fill(tmp_path, 0, 8)
    assert _hashes(tmp_path) == before


def test_latents_are_found_by_what_they_were_made_from(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, MODEL, 2) as writer:
        for i in range(3):
            writer.add(f"{i:03d}", **_clip(i), details={"latents": f"film {i}"})  # type: ignore[arg-type]
        for i in range(3):  # two of them in a shard, one waiting for its own
            found = writer.latents_of(f"film {i}")
            assert found is not None and torch.equal(found, _clip(i)["latents"])  # type: ignore[arg-type]
            writer.add(f"copy {i}", **{**_clip(9), "latents": found}, details={"latents": f"film {i}"})  # type: ignore[arg-type]
        assert writer.latents_of("none") is None and writer.latents_made == {"film 0", "film 1", "film 2"}
    begun = StoreWriter(tmp_path, MODEL)
    found = begun.latents_of("film 2")
    assert found is not None and torch.equal(found, _clip(2)["latents"])  # type: ignore[arg-type]


def test_a_shard_is_on_the_disk_before_the_index_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files by their inodes, which a new name does not change."""
    done: list[int | str] = []

    def replace(temporary: Path, target: Path, real: Any = os.replace) -> None:
        done.append(Path(target).name)
        real(temporary, target)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", replace)
    _fill(tmp_path, 0, 2)
    shard, shards, index, folder, empty = (
        path.stat().st_ino
        for path in (
            tmp_path / SHARDS / "00000.safetensors",
            tmp_path / SHARDS,
            tmp_path / INDEX,
            tmp_path,
            tmp_path / EMPTY,
        )
    )
    assert done == [EMPTY, empty, "00000.safetensors", shard, shards, index, INDEX, folder]


def test_a_text_that_the_disk_does_not_take_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "fsync", lambda handle: full(handle) if stat.S_ISDIR(os.fstat(handle).st_mode) else None)
    write_text(tmp_path / "a.json", "new")  # a disk that takes no folders
    assert (tmp_path / "a.json").read_text() == "new"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 2, 3, 3)}, r"7\.mp4: latents must be \[4, F, h, w\], got \[3, 2, 3, 3\]"),
        ({"text": torch.zeros(6, 6)}, r"text must be \[1\.\.5, 6\], got \[6, 6\]"),
        ({"text": torch.zeros(2, 7)}, r"text must be"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with StoreWriter(tmp_path, MODEL) as writer, pytest.raises(ValueError, match=message):
        writer.add("k", **{**_clip(7), **change})  # type: ignore[arg-type]


def test_a_key_goes_in_once_and_models_do_not_mix(tmp_path: Path) -> None:
    _fill(tmp_path, 0, 2)
    with StoreWriter(tmp_path, MODEL) as writer, pytest.raises(ValueError, match="already"):
        writer.add("001", **_clip(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"another model \(vae: v, now w\)"):
        StoreWriter(tmp_path, {**MODEL, "vae": "w"})


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pusa-fast prepare"):
        LatentStore(tmp_path)
    _fill(tmp_path, 0, 2)
    (tmp_path / EMPTY).unlink()
    with pytest.raises(ValueError, match="empty caption"):
        _ = LatentStore(tmp_path).empty_text
    shard = next((tmp_path / SHARDS).iterdir())
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        LatentStore(tmp_path).latents(0)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00000\.safetensors is missing"):
        LatentStore(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        LatentStore(tmp_path)
