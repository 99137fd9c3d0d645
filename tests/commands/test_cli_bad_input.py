"""Bad input: exit code 2, one line that names the value, no traceback, no file; known before the
model is loaded."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from bad_input import BAD
from pusa_fast import DiTConfig, Pipeline, VAEConfig, WanDiT, WanVAE, cli, video
from pusa_fast.device import OutOfMemory
from pusa_fast.pipeline import Run
from pusa_fast.weights import checkpoint, keymap

DEFAULTS = {
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "fps": 8,
    "steps": 4,
    "guidance_scale": 3.0,
    "shift": 3.0,
    "negative_prompt": "",
}
DIT = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=16)
VAE = VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
GENERATE = ["generate", "a red circle", "--model", "tiny"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, words)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_inputs(folder: Path) -> None:
    """Files that the commands below name: whole ones, damaged ones, and a model that lacks a
    tensor."""
    frames = torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8)
    video.write_video(folder / "nine.mp4", frames, fps=8)
    data = (folder / "nine.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 20)
    Image.fromarray(frames[0].numpy()).save(folder / "first.png")
    data = (folder / "first.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("this is no picture")
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0))
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    )
    for name in ("cut.json", "list.json"):
        (folder / name).write_text({"cut.json": '{"format": "pusa', "list.json": "[1]"}[name])
    record = {"format": "pusa-fast clip 1", "prompt": "x", "model": "tiny"}
    (folder / "odd.json").write_text(json.dumps({**record, "conditions": [{"path": "first.png", "latent": "zero"}]}))
    (folder / "tiled.json").write_text(json.dumps({**record, "tiling": ["a"]}))
    (folder / "hashed.json").write_text(json.dumps({**record, "hashes": [1]}))
    (folder / "nothing.json").write_text(json.dumps({**record, "written": []}))
    for name in ("numbered", "pictures.json"):
        (folder / name).mkdir()
    shutil.copy(folder / "first.png", folder / "numbered" / "0001.png")
    (folder / "slow.json").write_text(json.dumps({**record, "fps": "8"}))
    for name in ("pictures", "holiday", "tiny/text_encoder", "tiny/tokenizer", "half"):
        (folder / name).mkdir(parents=True)
    (folder / "holiday" / "photo.jpg").write_bytes(b"mine")
    # Whole headers, but for one tensor: a check may read the configuration, and loading fails.
    weights = keymap.unpack(WanDiT(DIT).state_dict())
    checkpoint.save(folder / "tiny" / "dit.safetensors", dict(list(weights.items())[:-1]), DIT)
    checkpoint.save(folder / "tiny" / "vae.safetensors", WanVAE(VAE).state_dict(), VAE)
    text = {"encoder": "text_encoder", "tokenizer": "tokenizer", "text_len": 8}
    spec = {"name": "tiny", "dit": "dit.safetensors", "vae": "vae.safetensors", "text": text, "defaults": DEFAULTS}
    (folder / "tiny" / "model.json").write_text(json.dumps(spec))
    (folder / "half" / "model.json").write_text(json.dumps({"name": "half"}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_answered(result: Result, parts: list[str]) -> bool:
    """Exit code 2 and one line on stderr that holds the parts."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    return True


@pytest.mark.parametrize("name", BAD)
def test_bad_input(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    before = files(here)
    words, parts = BAD[name]
    assert is_answered(run(*GENERATE, *words), parts)
    assert files(here) == before


def test_no_prompt(here: Path) -> None:
    assert is_answered(run("generate", "--model", "tiny"), ["give a prompt"])


def test_unknown_command() -> None:
    assert is_answered(run("generat"), ["'generat'", "'generate'"])


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "mps", "meta"])
def test_unknown_device_is_refused_before_weights_are_read(here: Path, device: str) -> None:
    """The model's files lack a tensor here: loading one would give another message."""
    assert is_answered(run(*GENERATE, "--device", device), [device])


def test_weights_that_are_damaged(here: Path) -> None:
    assert is_answered(run(*GENERATE), ["dit.safetensors"])


class StubPipeline:
    """In place of a loaded model: grey frames, or what `during` raises after the first step."""

    device = torch.device("cpu")
    dit = SimpleNamespace(dtype=torch.float32)

    def __init__(self, during: Callable[[int], None]) -> None:
        self.during, self.calls = during, 0

    def run(self, request: Any, callback: Any) -> Run:
        self.calls += 1
        chosen = request.settings
        callback(1, chosen.steps, None)
        self.during(self.calls)
        frames = torch.full((chosen.num_frames, chosen.height, chosen.width, 3), 128, dtype=torch.uint8)
        names = ("tiling", "encode_tiling", "overcompute", "guidance_mode", "tokens")
        record = {"task": "", "seconds": {"denoise": 0.0}, **dict.fromkeys(names)}
        return Run(frames, None, record)


def stub(monkeypatch: pytest.MonkeyPatch, during: Callable[[int], None]) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: StubPipeline(during))


def raising(error: BaseException, call: int = 1) -> Callable[[int], None]:
    def during(number: int) -> None:
        if number == call:
            raise error

    return during


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("decode", "on cpu"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_options_that_help(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = files(here)
    stub(monkeypatch, raising(error))
    assert is_answered(run(*GENERATE), ["out of memory", "--tiling auto", "--size", "--frames"])
    assert files(here) == before


def test_interrupted_while_denoising(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(here)
    stub(monkeypatch, raising(KeyboardInterrupt()))
    result = run(*GENERATE)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert files(here) == before


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 2)]
)
@pytest.mark.parametrize("out", ["clip.mp4", "clip.gif", "clip/"])
def test_interrupted_or_out_of_space_while_writing(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, out: str
) -> None:
    before = files(here)
    stub(monkeypatch, lambda number: None)
    from pusa_fast.media_plan import MediaPlan

    whole = MediaPlan.assemble

    def broken(*words: Any) -> Any:
        for number, frame in enumerate(whole(*words)):
            if number == 5:
                raise error
            yield frame

    monkeypatch.setattr(MediaPlan, "assemble", broken)
    result = run(*GENERATE, "--out", out)
    assert result.exit_code == code
    if code == 2:
        assert is_answered(result, ["no space left on device", "--out"])
    assert files(here) == before
    assert not list(here.glob(".pusa-fast*"))


def test_what_fails_after_the_clip_is_encoded_replaces_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip, sheet and record change together or not at all."""
    stub(monkeypatch, lambda number: None)
    assert run(*GENERATE).exit_code == 0
    before = files(here)
    from pusa_fast.commands import record

    def full(made: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record, "text", full)
    assert is_answered(run(*GENERATE, "--seed", "5", "--overwrite"), ["no space"])
    assert files(here) == before


def test_interrupted_between_seeds_keeps_what_is_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(here)
    stub(monkeypatch, raising(KeyboardInterrupt(), call=2))
    assert run(*GENERATE, "--seed", "1,2,3").exit_code == 130
    assert sorted(files(here).keys() - before.keys()) == ["clip-1.json", "clip-1.mp4", "clip-1.png"]


def test_a_failed_run_keeps_the_clip_that_it_would_replace(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, lambda number: None)
    assert run(*GENERATE).exit_code == 0
    before = files(here)
    stub(monkeypatch, raising(OSError(errno.ENOSPC, "No space left on device")))
    assert is_answered(run(*GENERATE, "--overwrite"), ["no space"])
    assert files(here) == before


def test_a_folder_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who can write anywhere
    assert is_answered(run(*GENERATE), ["cannot be written to"])


def test_debugging_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSA_FAST_DEBUG", "1")
    result = run(*GENERATE, "--frames", "16")
    assert isinstance(result.exception, ValueError)


def test_the_program_answers_in_one_line(here: Path) -> None:
    """As its own process: neither warnings nor a traceback join the answer, and a defect is one
    line too."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    defect = "import sys, pusa_fast.cli as c; c.app = 3; sys.argv = ['pusa-fast']; c.main()"
    commands = [["-m", "pusa_fast.cli", *GENERATE, "--frames", "16"], ["-c", defect]]
    runs = [
        subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment) for words in commands
    ]
    assert [(done.returncode, done.stdout, done.stderr.count("\n")) for done in runs] == [(2, "", 1), (1, "", 1)]
    assert runs[1].stderr.startswith("internal error: ")
