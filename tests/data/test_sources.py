"""Lists of clips: what they may look like, and what is said about those that cannot be used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from films import SMALL, frames_of, is_answered, run, write_csv
from pusa_fast import video
from pusa_fast.data.prepare import prepare
from pusa_fast.data.sources import read_sources


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
    assert found[1].problem == "has no caption: write b.txt next to it"
    assert "short.txt cannot be read" in str(found[4].problem)


def test_a_caption_that_is_null_is_empty(here: Path) -> None:
    (here / "l.jsonl").write_text('{"video": "films/a.mp4", "text": null}\n{"video": "films/b.mp4", "text": "x"}\n')
    made = prepare("l.jsonl", "out", buckets=SMALL)
    assert made.clips == 1 and made.bad == [("films/a.mp4", "its caption is empty: write what the clip shows")]
    (here / "l.jsonl").write_text('{"video": null, "text": "x"}\n')
    with pytest.raises(ValueError, match=r"l\.jsonl line 1: video=None is not text"):
        read_sources("l.jsonl")


BAD_LISTS: dict[str, tuple[str, bytes, list[str]]] = {
    "no columns": ("l.csv", b"", ["l.csv line 1", "no column file_name", "no column text", "among none"]),
    "other columns": ("l.csv", b"file,text\na.mp4,x\n", ["line 1", "no column file_name", "file, text"]),
    "comma in a text": (
        "l.csv", b"file_name,text\na.mp4,x\nb.mp4,big, red\n", ["line 3", "3 values for 2 columns", "'b.mp4'", "quotes"]
    ),
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
