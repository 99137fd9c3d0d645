"""Preparing into a folder again: it holds what the last list names; nothing is encoded twice."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from films import SMALL, frames_of, hashes, is_answered, run, trained_on, write_csv
from pusa_fast import WanVAE, video
from pusa_fast.data import catalog
from pusa_fast.data.catalog import FILES
from pusa_fast.data.prepare import REPORT, SHEET, prepare
from pusa_fast.data.store import INDEX, SELECTION, LatentStore, read_index
from pusa_fast.model.text import TextEncoder

# -- a folder that is prepared into again


def six_films(here: Path) -> list[str]:
    for i in range(6):
        video.write_video(here / f"{i}.mp4", frames_of(9, i, (32, 32)), fps=8)
    return [f"{i}.mp4,a red circle {i}" for i in range(6)]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The results of calls to come of `owner.name`."""
    found, real = list[Any](), getattr(owner, name)

    def call(*words: Any, **named: Any) -> Any:
        found.append(real(*words, **named))
        return found[-1]

    monkeypatch.setattr(owner, name, call)
    return found


def test_the_folder_is_what_the_last_list_names(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = six_films(here)
    write_csv(here / "one.csv", *rows)
    write_csv(here / "two.csv", "0.mp4,a blue square", *rows[1:5])
    prepare("one.csv", "out", buckets=SMALL, shard_clips=4)
    first, whole = trained_on("out"), LatentStore("out").fingerprint
    result = run("two.csv", "--out", "out", "--bucket", SMALL[0], "--shard-clips", "4")
    assert result.stderr.splitlines() == [
        "note: 2 clips of earlier lists or settings stay in out unused: prepare those again with --add "
        "to train on both",
        "5 clips in out (1 new): 5 of 32x32x5",
    ]
    assert trained_on("out") == [("0.mp4", "a blue square"), *first[1:5]]
    before = hashes(here / "out")
    prepare("two.csv", "out", buckets=SMALL, shard_clips=4)
    assert hashes(here / "out") == before
    prepare("two.csv", "fresh", buckets=SMALL)
    again, fresh = LatentStore("out"), LatentStore("fresh")
    assert again.fingerprint == fresh.fingerprint != whole
    assert all(
        torch.equal(again.latents(i), fresh.latents(i)) and torch.equal(again.text(i), fresh.text(i)) for i in range(5)
    )
    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(f"pusa_fast.data.encoding.{name}", None)
    assert prepare("one.csv", "out", buckets=SMALL).new == 0  # going back makes nothing anew
    assert trained_on("out") == first and LatentStore("out").fingerprint == whole


@pytest.mark.parametrize(
    "setting", [{"buckets": ["16x16x1"]}, {"fps": 4, "buckets": ["32x32x1"]}, {"start": "middle"}, {"fit": "pad"}]
)
def test_other_settings_take_the_place_of_the_clips_before(here: Path, setting: dict[str, Any]) -> None:
    write_csv(here / "l.csv", "films/b.mp4,x", "films/tall.mp4,y")
    prepare("l.csv", "out", buckets=SMALL)
    first = {clip.key for clip in LatentStore("out").clips}
    assert len(prepare("l.csv", "out", **{"buckets": SMALL, **setting}).notes) == 1
    assert len(LatentStore("out")) == 2 and not first & {clip.key for clip in LatentStore("out").clips}


def test_add_keeps_the_clips_before(here: Path) -> None:
    rows = six_films(here)
    write_csv(here / "one.csv", *rows[:4])
    write_csv(here / "two.csv", "0.mp4,corrected", *rows[2:])
    prepare("one.csv", "out", buckets=SMALL)
    first = trained_on("out")
    result = run("two.csv", "--out", "out", "--bucket", SMALL[0], "--add")
    assert result.stderr.splitlines() == [
        "note: 2 clips of earlier lists or settings are kept with these",
        "5 clips in out (3 new): 5 of 32x32x5",
    ]
    assert trained_on("out") == [
        *first,
        ("0.mp4", "corrected"),
        ("4.mp4", "a red circle 4"),
        ("5.mp4", "a red circle 5"),
    ]
    before = hashes(here / "out")
    assert prepare("two.csv", "out", buckets=SMALL, add=True).new == 0
    assert hashes(here / "out") == before
    prepare("two.csv", "out", buckets=SMALL)
    assert len(LatentStore("out")) == 5
    (here / "out" / SELECTION).write_text("{")
    is_answered(
        run("two.csv", "--out", "out", "--bucket", SMALL[0], "--add"), ["selection.json is damaged", "without --add"]
    )
    assert prepare("two.csv", "out", buckets=SMALL).new == 0 and len(LatentStore("out")) == 5


def test_a_list_that_cannot_be_prepared_leaves_the_clips_before(here: Path) -> None:
    write_csv(here / "l.csv", "films/a.mp4,x")
    prepare("l.csv", "out", buckets=SMALL)
    write_csv(here / "l.csv", "films/cut.mp4,x")
    with pytest.raises(ValueError, match="none of 1 clips"):
        prepare("l.csv", "out", buckets=SMALL)
    assert trained_on("out") == [("films/a.mp4", "x")]


@pytest.mark.parametrize(("whole_files", "add"), [(i, bool(i % 2)) for i in range(7)])
def test_stopped_in_a_second_list(here: Path, monkeypatch: pytest.MonkeyPatch, whole_files: int, add: bool) -> None:
    """Until the end training sees the first list; then the same bytes as without the stop."""
    write_csv(here / "one.csv", *(f"films/a.mp4,caption {i}" for i in range(3)))
    write_csv(here / "two.csv", "films/b.mp4,caption 9", *(f"films/a.mp4,caption {i}" for i in range(1, 6)))
    size: dict[str, Any] = {"buckets": ["32x32x1"], "shard_clips": 2}
    for name in ("stopped", "whole"):
        prepare("one.csv", name, **size)
    first, written = trained_on("stopped"), []

    def full(temporary: Any, target: Any, real: Any = os.replace) -> None:
        if len(written) == whole_files:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        written.append(Path(target).name)
        real(temporary, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        prepare("two.csv", "stopped", add=add, **size)
    assert written == [FILES, "00002.safetensors", INDEX, "00003.safetensors", INDEX, SHEET, REPORT][:whole_files]
    assert trained_on("stopped") == first
    for name in ("stopped", "whole"):
        prepare("two.csv", name, add=add, **size)
    assert hashes(here / "stopped") == hashes(here / "whole")
    assert len(LatentStore("whole")) == (7 if add else 6)


# -- nothing is encoded twice


def test_another_caption_encodes_no_film_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(here / "l.csv", "films/b.mp4,red")
    write_csv(here / "fresh.csv", "films/b.mp4,blue", "films/a.mp4,blue")
    prepare("l.csv", "out", buckets=SMALL, clips_per_video=2)
    encoded, decoded = counted(monkeypatch, WanVAE, "encode"), counted(monkeypatch, video, "fit")
    shutil.move("films/b.mp4", "films/renamed.mp4")
    write_csv(here / "l.csv", "films/renamed.mp4,blue")
    assert prepare("l.csv", "out", buckets=SMALL, clips_per_video=2).new == 2
    assert encoded == [] and len(decoded) == 4  # two tiles of the sheet, each fitted twice
    shutil.move("films/renamed.mp4", "films/b.mp4")
    # One window of two is there already.
    prepare("fresh.csv", "out", buckets=SMALL, clips_per_video=3)
    assert len(encoded) == 4
    prepare("fresh.csv", "fresh", buckets=SMALL, clips_per_video=3)
    for out, fresh in zip(*(LatentStore(name).clips for name in ("out", "fresh")), strict=True):
        assert out.key == fresh.key and out.details == fresh.details
    assert all(torch.equal(LatentStore("out").latents(i), LatentStore("fresh").latents(i)) for i in range(6))
    assert all(torch.equal(LatentStore("out").text(i), LatentStore("fresh").text(i)) for i in range(6))


@pytest.mark.parametrize("shard_clips", [1, 2, 64])
def test_a_film_under_two_captions_is_encoded_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, shard_clips: int
) -> None:
    shutil.copy("films/a.mp4", "films/again.mp4")
    write_csv(here / "l.csv", "films/a.mp4,red", "films/b.mp4,red", "films/again.mp4,blue", "films/a.mp4,green")
    encoded = counted(monkeypatch, WanVAE, "encode")
    prepare("l.csv", "out", buckets=SMALL, shard_clips=shard_clips, dtype="float32")
    assert len(encoded) == 2
    found = LatentStore("out")
    for i, latents in enumerate([encoded[0], encoded[1], encoded[0], encoded[0]]):
        assert torch.equal(found.latents(i), latents[0])
    assert len({tuple(found.text(i).flatten().tolist()) for i in (0, 2, 3)}) == 3


def test_a_caption_that_cannot_be_encoded_does_not_take_the_film_with_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextEncoder.encode

    def failing(self: TextEncoder, prompts: list[str]) -> Tensor:
        return encode(self, prompts) * (torch.inf if prompts == ["bad"] else 1)

    monkeypatch.setattr(TextEncoder, "encode", failing)
    write_csv(here / "l.csv", "films/a.mp4,bad", "films/a.mp4,good", "odd,x", "odd,y")
    for i, size in enumerate([(32, 32), (48, 32), (32, 32), (32, 32), (32, 32)]):
        (here / "odd").mkdir(exist_ok=True)
        Image.new("RGB", size).save(here / "odd" / f"{i}.png")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert trained_on("out") == [("films/a.mp4", "good")]
    assert [name for name, _ in made.bad] == ["films/a.mp4", "odd", "odd"]
    assert "not finite" in made.bad[0][1] and made.bad[1][1] == made.bad[2][1] and "several sizes" in made.bad[1][1]


def test_a_second_run_reads_and_encodes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(here / "l.csv", "films/a.mp4,x", "films/b.mp4,y", "films/b.mp4,y")
    prepare("l.csv", "out", buckets=SMALL)
    before = hashes(here / "out")
    with monkeypatch.context() as patch:
        for name in ("encoding.load_vae", "encoding.load_text_encoder", "prepare.write_sheet"):
            patch.setattr(f"pusa_fast.data.{name}", None)
        for name in ("file_hash", "measure"):
            patch.setattr(catalog, name, None)
        again = prepare("l.csv", "out", buckets=SMALL)
    assert (again.clips, again.new, again.duplicates) == (2, 0, 1)
    assert hashes(here / "out") == before
    video.write_video("films/a.mp4", frames_of(9, 99), fps=8)  # another film under the same name
    assert prepare("l.csv", "out", buckets=SMALL).new == 1
    assert [clip.source for clip in LatentStore("out").clips] == ["films/a.mp4", "films/b.mp4"]
    assert len(read_index(here / "out")[0]) == 3
    (here / "out" / FILES).write_text("{")  # only saves work
    assert prepare("l.csv", "out", buckets=SMALL).new == 0
