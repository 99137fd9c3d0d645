"""`pusa-fast prepare`: what it makes of a list, what it says about bad clips and bad options."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from films import SMALL, frames_of, hashes, is_answered, real_file, report, run, write_csv
from pusa_fast import Tiling, WanVAE, video
from pusa_fast.data import catalog
from pusa_fast.data.buckets import Bucket, choose
from pusa_fast.data.prepare import REPORT, SHEET, prepare
from pusa_fast.data.store import LatentStore, read_index
from pusa_fast.model.text import TextEncoder
from pusa_fast.sampling.conditioning import to_video
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import find_model


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(find_model("nano").vae, dtype=torch.float32)


# -- what is made


@pytest.mark.parametrize(
    ("name", "size", "frames"), [("bikes.mp4", (640, 272), 250), ("bigbuckbunny.mp4", (1280, 720), 132)]
)
def test_latents_and_text_of_real_films(
    tmp_path: Path, vae: WanVAE, name: str, size: tuple[int, int], frames: int
) -> None:
    write_csv(tmp_path / "l.csv", f"{real_file(name)},a red circle moves right")
    made = prepare(
        tmp_path / "l.csv",
        tmp_path / "out",
        buckets=["64x64x5", "48x32x1"],
        clips_per_video=2,
        fit="pad",
        dtype="float32",
    )
    assert (made.clips, made.new, made.duplicates, made.bad) == (2, 2, 0, [])
    bucket = choose([Bucket(64, 64, 5), Bucket(48, 32, 1)], *size, frames)
    assert bucket is not None and made.buckets == {str(bucket): 2}
    found = LatentStore(tmp_path / "out")
    ends = video.read_video(real_file(name), max_frames=5), video.read_video(real_file(name), last_frames=5)
    text = TextEncoder.from_directory(
        find_model("nano").text_encoder, find_model("nano").tokenizer, dtype=torch.float32, text_len=24
    )
    for i, start in enumerate((0, frames - bucket.frames)):
        wanted = ends[i][: bucket.frames] if i == 0 else ends[i][-bucket.frames :]
        fitted = video.fit(wanted, (bucket.width, bucket.height), "pad")
        made_from = found.clips[i].details["latents"]
        assert found.clips[i].details == {
            "latents": made_from, "file": hashlib.sha256(real_file(name).read_bytes()).hexdigest(), "start": start,
            "frames": bucket.frames, "fps": None, "fit": "pad",
        }  # fmt: skip
        assert torch.equal(found.latents(i), vae.encode(to_video(fitted, torch.device("cpu")))[0])
        assert torch.equal(found.text(i), text.encode(["a red circle moves right"])[0])
        assert found.clips[i].tokens < 24
    assert torch.equal(found.empty_text, text.encode([""])[0])
    with Image.open(tmp_path / "out" / SHEET) as sheet:
        assert sheet.size == (320, round(160 * bucket.height / bucket.width))


def test_fps_counts_and_reads_resampled_frames(here: Path, vae: WanVAE) -> None:
    write_csv(here / "l.csv", "films/b.mp4,x", "films/a.mp4,x", "films/still.png,x")
    made = prepare("l.csv", "out", buckets=["32x32x5"], fps=4, start="middle", dtype="float32", tiling="auto")
    assert made.bad == [("films/still.png", "is a picture, 1 frame, the shortest bucket needs 5")]
    found = LatentStore("out")
    for i, name in enumerate("ba"):
        frames = video.read_video(f"films/{name}.mp4", fps=4)
        start = (len(frames) - 5) // 2
        wanted = vae.encode(to_video(video.fit(frames[start : start + 5], (32, 32)), torch.device("cpu")))[0]
        assert torch.equal(found.latents(i), wanted)
    assert [clip.details["fps"] for clip in found.clips] == [4.0, 4.0]


def test_pictures_folders_of_pngs_and_stored_dtypes(here: Path) -> None:
    video.write_video("films/pngs/", frames_of(5, 1), fps=8)
    write_csv(here / "l.csv", "films/still.png,a still", "films/pngs,pictures", "films/tall.mp4,tall")
    made = prepare("l.csv", "out", buckets=["48x32x1", "48x32x5", "32x64x5"], dtype="float16")
    assert made.buckets == {"32x64x5": 1, "48x32x1": 1, "48x32x5": 1}
    found = LatentStore("out")
    assert [clip.shape for clip in found.clips] == [(16, 1, 4, 6), (16, 2, 4, 6), (16, 2, 8, 4)]
    assert {found.latents(0).dtype, found.text(0).dtype, found.empty_text.dtype} == {torch.float16}


def test_duplicates_are_made_once_and_captions_count(here: Path) -> None:
    shutil.copy("films/a.mp4", "films/again.mp4")
    write_csv(here / "l.csv", "films/a.mp4,x", "films/again.mp4,x", "films/a.mp4,y")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert (made.clips, made.duplicates) == (2, 1)
    assert [(clip.source, clip.caption) for clip in LatentStore("out").clips] == [
        ("films/a.mp4", "x"),
        ("films/a.mp4", "y"),
    ]
    assert report(here / "out")["duplicates"] == 1


def test_every_setting_makes_another_clip(here: Path) -> None:
    write_csv(here / "l.csv", "films/tall.mp4,x")
    settings: list[dict[str, Any]] = [{}, {"fit": "pad"}, {"buckets": ["32x32x1"]}, {"start": "middle"}, {"fps": 7.5}]
    settings.append({"tiling": Tiling(tile=(4, 2), stride=(2, 1))})
    made = [prepare("l.csv", "out", **{"buckets": SMALL, **more}) for more in settings]
    assert [m.new for m in made] == [1] * len(settings)
    stored = read_index(here / "out")[0]
    assert len(stored) == len({clip.details["latents"] for clip in stored}) == len(settings)
    assert (
        prepare("l.csv", "out", buckets=SMALL, tiling=Tiling(mode="exact", tile=(2, 2))).new == 0
    )  # gives the same latents
    with pytest.raises(ValueError, match=r"out holds clips of another model \(dtype: bfloat16, now float32\)"):
        prepare("l.csv", "out", buckets=SMALL, dtype="float32")


def test_random_windows_differ_by_film_and_seed_and_come_again(here: Path) -> None:
    for i in range(3):
        video.write_video(here / f"{i}.mp4", frames_of(50, i, (32, 32)), fps=8)
    write_csv(here / "l.csv", *(f"{i}.mp4,x" for i in range(3)))
    made = {
        name: prepare("l.csv", name, buckets=["16x16x1"], start="random", seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert [m.clips for m in made.values()] == [3, 3, 3]
    a, b, c = ([clip.details["start"] for clip in LatentStore(name).clips] for name in made)
    assert a == b != c
    assert len(set(a)) > 1


def test_captions_that_are_too_long_are_noted(here: Path) -> None:
    write_csv(here / "l.csv", "films/a.mp4," + "red " * 40, "films/b.mp4,short")
    result = run("l.csv", "--out", "out", "--bucket", SMALL[0])
    assert result.exit_code == 0, result.output
    note, counts = result.stderr.splitlines()
    assert (
        note == "note: 1 captions are cut after 24 tokens, all that the model reads; the first is that of films/a.mp4"
    )
    assert counts == "2 clips in out (2 new): 2 of 32x32x5"
    assert LatentStore("out").clips[0].tokens == 24


# -- bad clips


def test_bad_clips_are_listed_and_the_rest_is_made(here: Path) -> None:
    (here / "films" / "text.mp4").write_text("no film\n" * 30)
    rows = ["cut.mp4,x", "a.mp4,x", "short.mp4,x", "none.mp4,x", "text.mp4,x", "b.mp4,"]
    write_csv(here / "films" / "metadata.csv", *rows)
    result = run("films", "--out", "out", "--bucket", SMALL[0], "--fps", "8")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "1 clips in out (1 new): 1 of 32x32x5; 5 bad, see report.json\n"
    found = report(here / "out")
    assert (found["clips"], found["buckets"]) == (1, {"32x32x5": 1})
    reasons = {entry["source"]: entry["reason"] for entry in found["bad"]}
    assert list(reasons) == ["cut.mp4", "short.mp4", "none.mp4", "text.mp4", "b.mp4"]
    assert "truncated" in reasons["cut.mp4"]
    assert reasons["short.mp4"] == "has 3 frames at 8 fps, the shortest bucket needs 5"
    assert reasons["none.mp4"].startswith("missing")
    assert reasons["text.mp4"].startswith("cannot be read") or "no video" in reasons["text.mp4"]
    assert reasons["b.mp4"] == "its caption is empty: write what the clip shows"
    is_answered(run("films", "--out", "strict", "--bucket", SMALL[0], "--strict"), ["cut.mp4", "truncated"])
    assert not (here / "strict" / "index.json").exists()


def test_frames_that_change_in_size_are_bad_only_when_read(here: Path) -> None:
    for i, size in enumerate([(32, 32), (48, 32), (32, 32), (32, 32), (32, 32)]):
        (here / "odd").mkdir(exist_ok=True)
        Image.new("RGB", size).save(here / "odd" / f"{i}.png")
    write_csv(here / "l.csv", "odd,x")
    is_answered(
        run("l.csv", "--out", "none", "--bucket", SMALL[0]), ["none of 1 clips", "odd: holds frames of several sizes"]
    )
    assert (here / "none" / REPORT).exists() and not (here / "none" / "index.json").exists()
    write_csv(here / "l.csv", "odd,x", "films/a.mp4,x")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert made.clips == 1 and made.bad == [
        ("odd", "holds frames of several sizes (32x32 and 48x32): convert it to one size")
    ]


def test_nothing_that_can_be_used_is_an_error_with_a_report(here: Path) -> None:
    write_csv(here / "l.csv", "films/short.mp4,x", "films/cut.mp4,x")
    is_answered(
        run("l.csv", "--out", "out", "--bucket", SMALL[0]), ["none of 2 clips", "films/short.mp4: has 3 frames"]
    )
    assert len(report(here / "out")["bad"]) == 2
    write_csv(here / "l.csv", "films/a.mp4,x")
    assert prepare("l.csv", "out", buckets=SMALL).clips == 1


BAD_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "bucket not divisible": (["--bucket", "70x64x5"], ["--bucket 70x64x5", "width 70", "64 or 80"]),
    "bucket of a small side": (["--bucket", "64x8x5"], ["height 8", "use 16"]),
    "bucket of odd frames": (["--bucket", "64x64x16"], ["16 frames", "13 or 17"]),
    "bucket of no frames": (["--bucket", "64x64x0"], ["0 frames", "use 1"]),
    "bucket without frames": (["--bucket", "64x64"], ["--bucket 64x64", "832x480x81"]),
    "fps": (["--fps", "0"], ["--fps=0"]),
    "fps in words": (["--fps", "few"], ["'few' is not a number"]),
    "no clips": (["--clips-per-video", "0"], ["--clips-per-video", "got 0"]),
    "empty shards": (["--shard-clips", "0"], ["--shard-clips", "got 0"]),
    "seed": (["--seed", "-1"], ["--seed", "-1"]),
    "start": (["--start", "last"], ["'last'", "middle"]),
    "fit": (["--fit", "zoom"], ["'zoom'"]),
    "dtype": (["--dtype", "int8"], ["'int8'"]),
    "tiling": (["--tiling", "round"], ["'round'"]),
    "model": (["--model", "nowhere"], ["nowhere", "not a model"]),
    "device": (["--device", "gpu"], ["gpu"]),
    "out that is a file": (["--out", "l.csv"], ["l.csv is a file"]),
    "out of other things": (["--out", "films"], ["films holds a.mp4", "another folder"]),
    "out of the clips": (["--out", "."], ["folder of the clips"]),
    "unknown option": (["--bogus"], ["--bogus"]),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Answered before any work."""
    monkeypatch.setattr(catalog, "measure", lambda *words: pytest.fail("a film was decoded"))
    write_csv(here / "l.csv", "films/a.mp4,x")
    words, parts = BAD_OPTIONS[name]
    before = hashes(here)
    is_answered(run("l.csv", *([] if "--out" in words else ["--out", "out"]), *words), parts)
    assert hashes(here) == before


def test_nothing_is_given() -> None:
    is_answered(run(), ["SOURCE"])
    is_answered(run("l.csv"), ["--out"])
