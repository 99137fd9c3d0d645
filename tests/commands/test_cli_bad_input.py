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


# What is typed after `generate "a red circle" --model tiny`, and what the answer has to contain.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "size not divisible": (["--size", "70x64"], ["width=70", "64 or 80"]),
    "height not divisible": (["--size", "64x40"], ["height=40", "32 or 48"]),
    "size of nothing": (["--size", "0x64"], ["width=0"]),
    "size that is no size": (["--size", "64"], ["--size 64", "832x480"]),
    "frames not 4k+1": (["--frames", "16"], ["--frames=16", "13 or 17"]),
    "no frames": (["--frames", "0"], ["--frames", "0"]),
    "negative frames": (["--frames", "-3"], ["-3"]),
    "no steps": (["--steps", "0"], ["--steps", "got 0"]),
    "steps in words": (["--steps", "two"], ["'two' is not a whole number"]),
    "shift of nothing": (["--shift", "0"], ["--shift", "got 0"]),
    "negative guidance": (["--guidance", "-1"], ["--guidance", "-1"]),
    "guidance that is no number": (["--guidance", "nan"], ["--guidance", "nan"]),
    "fps of nothing": (["--fps", "0"], ["--fps=0"]),
    "fps that is no number": (["--fps", "nan"], ["--fps=nan"]),
    "negative seed": (["--seed", "-1"], ["--seed -1"]),
    "seed too large": (["--seed", "9999999999999999999"], ["seed", "9999999999999999999"]),
    "seed twice": (["--seed", "1,2,1"], ["--seed 1", "twice"]),
    "unknown compat": (["--compat", "close"], ["'close'"]),
    "unknown fit": (["--fit", "zoom"], ["'zoom'"]),
    "unknown tiling": (["--tiling", "round"], ["'round'"]),
    "unknown dtype": (["--dtype", "int8"], ["'int8'"]),
    "unknown attention": (["--attention", "fa9"], ["'fa9'", "sdpa"]),
    "unknown option": (["--bogus"], ["--bogus"]),
    "latent outside": (["--keyframe", "first.png@9:0.1"], ["first.png: latent 9", "0 to 4"]),
    "negative latent outside": (["--keyframe", "first.png@-6"], ["latent -6", "0 to 4"]),
    "keyframe without latent": (["--keyframe", "first.png"], ["--keyframe first.png", "PATH@LATENT:NOISE"]),
    "keyframe with odd latent": (["--keyframe", "first.png@x:0.1"], ["first.png@x:0.1", "PATH@LATENT:NOISE"]),
    "kept latent outside": (["--video", "nine.mp4", "--keep", "0-7"], ["latent 5", "0 to 4"]),
    "kept latents unreadable": (["--video", "nine.mp4", "--keep", "3-1"], ["--keep 3-1"]),
    "noise above 1": (["--image", "first.png", "--image-noise", "1.2"], ["1.2", "noise"]),
    "noise below 0": (["--end-image", "first.png", "--end-noise", "-0.1"], ["-0.1", "noise"]),
    "noise that is no number": (["--image", "first.png", "--image-noise", "nan"], ["nan", "noise"]),
    "noise of a keyframe": (["--keyframe", "first.png@1:7"], ["first.png@1:7", "7", "[0, 1]"]),
    "noise of a keyframe in words": (["--keyframe", "first.png@1:some"], ["some"]),
    "noise of kept latents": (["--video", "nine.mp4", "--keep", "0-1", "--keep-noise", "0,2"], ["--keep-noise 2"]),
    "noise of an extension nan": (["--extend", "nine.mp4", "--keep-noise", "nan"], ["nan"]),
    "counts that do not match": (
        ["--video", "nine.mp4", "--keep", "0-2", "--keep-noise", "0,0.1"],
        ["2 values", "3 latents"],
    ),
    "counts of a transition": (
        ["--transition", "nine.mp4", "nine.mp4", "--keep-noise", "0,0,0"],
        ["3 values", "4 latents"],
    ),
    "too many for the overlap": (
        ["--extend", "nine.mp4", "--overlap", "5", "--keep-noise", "0,0,0"],
        ["3 values", "2 latents"],
    ),
    "two on one latent": (["--image", "first.png", "--keyframe", "first.png@0"], ["first.png both give latent 0"]),
    "two on the last latent": (["--end-image", "first.png", "--keyframe", "first.png@4"], ["latent 4"]),
    "kept latent twice": (["--video", "nine.mp4", "--keep", "1,0-2"], ["twice"]),
    "overlap not 4k+1": (["--extend", "nine.mp4", "--overlap", "8"], ["--overlap 8", "5 or 9"]),
    "extension of one frame": (["--extend", "nine.mp4", "--frames", "1"], ["--frames 1", "at least 5"]),
    "overlap of everything": (["--extend", "nine.mp4", "--overlap", "17"], ["--overlap 17", "17 frames", "at most 13"]),
    "ends that do not fit": (["--transition", "nine.mp4", "nine.mp4", "--ends", "3"], ["--ends 3", "5 latents"]),
    "no ends": (["--transition", "nine.mp4", "nine.mp4", "--ends", "0"], ["--ends 0"]),
    "one clip for a transition": (["--transition", "nine.mp4"], ["--transition"]),
    "extension shorter than kept": (["--extend", "nine.mp4", "--overlap", "13"], ["nine.mp4", "9 frames", "13"]),
    "video shorter than kept": (["--video", "nine.mp4", "--keep", "0-3"], ["nine.mp4", "9 frames", "13"]),
    "second clip shorter than kept": (
        ["--transition", "nine.mp4", "nine.mp4", "--ends", "2", "--fps", "4"],
        ["nine.mp4", "5 frames"],
    ),
    "noise without its picture": (["--image-noise", "0.2"], ["--image-noise needs --image"]),
    "overlap without its clip": (["--overlap", "9"], ["--overlap needs --extend"]),
    "video without keep": (["--video", "nine.mp4"], ["--video needs --keep"]),
    "two clips": (["--extend", "nine.mp4", "--transition", "nine.mp4", "nine.mp4"], ["--extend and --transition"]),
    "missing picture": (["--image", "none.png"], ["none.png", "no such file"]),
    "truncated picture": (["--image", "cut.png"], ["cut.png", "truncated"]),
    "text as a picture": (["--end-image", "text.png"], ["text.png", "not a picture"]),
    "folder as a picture": (["--image", "holiday"], ["holiday", "give a file"]),
    "decompression bomb": (["--image", "bomb.png"], ["bomb.png", "would unpack to more than"]),
    "missing video": (["--extend", "none.mp4", "--overlap", "5"], ["none.mp4", "no such file"]),
    "truncated video": (["--extend", "cut.mp4", "--overlap", "5"], ["cut.mp4", "truncated"]),
    "truncated after what is kept": (["--video", "cut.mp4", "--keep", "0"], ["cut.mp4", "truncated"]),
    "truncated second clip": (["--transition", "nine.mp4", "cut.mp4", "--ends", "1"], ["cut.mp4", "truncated"]),
    "out folder that holds the input": (
        ["--image", "numbered/0001.png", "--out", "numbered/", "--overwrite"],
        ["0001.png", "made from"],
    ),
    "out folder that is a file": (["--out", "first.png/", "--overwrite"], ["first.png", "is a file"]),
    "sheet in a folder's place": (["--out", "pictures.mp4", "--overwrite"], ["pictures.json", "is a folder"]),
    "out without a name": (["--out", ""], ["names no file"]),
    "gif at a rate no player shows": (["--out", "clip.gif", "--fps", "60"], ["60", "50"]),
    "rate that rounds to nothing": (["--fps", "0.00001"], ["1e-05", "0.001"]),
    "more frames than a film": (["--frames", "100000000000000001"], ["100000000000000001", "100001"]),
    "more steps than levels": (["--steps", "100000"], ["100000", "1000"]),
    "record with a list for a word": (["--from", "tiled.json"], ["tiling", "'a'"]),
    "record with odd hashes": (["--from", "hashed.json"], ["hashes"]),
    "record that writes nothing": (["--from", "nothing.json"], ["written"]),
    "empty video": (["--video", "empty.mp4", "--keep", "0"], ["empty.mp4", "empty"]),
    "text as a video": (["--video", "text.mp4", "--keep", "0"], ["text.mp4"]),
    "folder without pictures": (["--video", "holiday", "--keep", "0"], ["holiday", "without PNG"]),
    "missing LoRA": (["--lora", "none.safetensors:1.4"], ["none.safetensors", "does not exist"]),
    "LoRA of no strength": (["--lora", "x.safetensors:nan"], ["nan"]),
    "LoRA of one expert and of all": (["--lora", "high=x.pt", "--lora", "y.pt"], ["high=x.pt", "before each path"]),
    "LoRA for an expert of a single model": (["--lora", "low=first.png:0.5"], ["no experts", "low"]),
    "none and a LoRA": (["--lora", "none", "--lora", "x.safetensors"], ["none"]),
    "output of another kind": (["--out", "clip.avi"], ["clip.avi", ".mp4"]),
    "output into nowhere": (["--out", "nowhere/clip.mp4"], ["nowhere", "does not exist"]),
    "output that exists": (["--out", "nine.mp4"], ["nine.mp4 exists", "--overwrite"]),
    "sheet that exists": (["--out", "first.mp4"], ["first.png exists", "--overwrite"]),
    "output over its input": (
        ["--extend", "nine.mp4", "--overlap", "5", "--out", "nine.mp4", "--overwrite"],
        ["nine.mp4", "made from"],
    ),
    "sheet over its input": (["--image", "first.png", "--out", "first.mp4", "--overwrite"], ["first.png", "made from"]),
    "output over a folder": (["--out", "holiday", "--overwrite"], ["holiday", "photo.jpg"]),
    "model that is missing": (["--model", "nowhere"], ["nowhere", "not a model"]),
    "folder that is no model": (["--model", "holiday"], ["holiday", "not a model", "model.json"]),
    "model that is incomplete": (["--model", "half"], ["half"]),
    "file as a model": (["--model", "first.png"], ["first.png", "not a model"]),
    "record that is missing": (["--from", "none.json"], ["none.json", "no such file"]),
    "record that is damaged": (["--from", "cut.json"], ["cut.json", "JSON"]),
    "record of something else": (["--from", "list.json"], ["list.json", "record"]),
    "record that is a clip": (["--from", "nine.mp4"], ["nine.mp4", "JSON"]),
    "record with an odd condition": (["--from", "odd.json"], ["first.png", "'zero'"]),
    "record with an odd rate": (["--from", "slow.json"], ["'8'"]),
}


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
            "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
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
