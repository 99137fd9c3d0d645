"""`pusa-fast prepare` killed, stopped or out of memory: a stop costs nothing but time."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from films import SMALL, hashes, is_answered, prepare_slowly, run, write_csv
from pusa_fast import WanVAE
from pusa_fast.data.catalog import FILES
from pusa_fast.data.prepare import REPORT, SHEET, prepare
from pusa_fast.data.store import EMPTY, INDEX, SELECTION, LatentStore, read_index
from pusa_fast.model.text import TextEncoder


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(here: Path, start: Callable[..., Any]) -> None:
    rows = [f"films/{name}.mp4,caption {i}" for i in range(6) for name in "ab"]
    write_csv(here / "l.csv", *rows, "films/cut.mp4,x")
    process = start(prepare_slowly, here)
    shards = here / "killed" / "shards"
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline and not (shards / "00002.safetensors").exists():
        time.sleep(0.001)
    process.kill()
    code, _, said = process.finish()
    assert code == -signal.SIGKILL, said
    assert not (here / "killed" / REPORT).exists()
    survived = len(read_index(here / "killed")[0])
    assert 2 <= survived < 24
    with pytest.raises(ValueError, match="killed is not ready: no prepare of it has finished"):
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
    """A full disk: its error reaches the command line as one line, and complete shards stay."""
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
