"""`pusa-fast generate` from end to end, on a tiny model with random weights in nano's layout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner, Result

from pusa_fast import Condition, DiTConfig, Pipeline, VAEConfig, WanDiT, WanVAE, cli, video
from pusa_fast.commands.generate import Thinned
from pusa_fast.weights import checkpoint, keymap

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "right", "on", "gray", "background")
DEFAULTS = {
    "num_frames": 17,
    "height": 32,
    "width": 48,
    "fps": 8,
    "steps": 2,
    "guidance_scale": 2.0,
    "shift": 3.0,
    "negative_prompt": "",
}
FPS = DEFAULTS["fps"]
RED = torch.tensor([220, 30, 30], dtype=torch.uint8)


def random_weights(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in module.state_dict().items()}


def save_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_lora(path: Path, dim: int) -> None:
    """On a projection whose output nothing normalises, so that the frames show its strength."""
    generator = torch.Generator().manual_seed(6)
    name = "blocks.1.ffn.2"
    tensors = {f"{name}.lora_A.default.weight": torch.randn(2, 32, generator=generator)}
    tensors[f"{name}.lora_B.default.weight"] = torch.randn(dim, 2, generator=generator)
    checkpoint.save(path, tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    dit = DiTConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
    )
    vae = VAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    checkpoint.save(folder / "dit.safetensors", keymap.unpack(random_weights(WanDiT(dit))), dit)
    checkpoint.save(folder / "vae.safetensors", random_weights(WanVAE(vae)), vae)
    save_lora(folder / "lora.safetensors", dit.dim)
    save_lora(folder / "other_lora.safetensors", 2 * dit.dim)
    torch.manual_seed(7)
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    spec = {
        "name": "tiny", "dit": "dit.safetensors", "vae": "vae.safetensors", "lora": {"lora.safetensors": 1.0},
        "text": {"encoder": "text_encoder", "tokenizer": "tokenizer", "text_len": 8}, "defaults": DEFAULTS,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["generate", *map(str, words)])


def make(model: Path, *words: str | Path) -> dict[str, Any]:
    """Generate, expect success, and return the record of clip.json."""
    result = run("a red circle moves right", "--model", model, *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(Path("clip.json").read_text())
    return found


def clip(count: int, shade: int = 0, size: tuple[int, int] = (48, 32)) -> Tensor:
    """A bar that moves two pixels a frame; as PNGs the frames come back exactly."""
    frames = torch.full((count, size[1], size[0], 3), 40 + shade, dtype=torch.uint8)
    for index in range(count):
        frames[index, :, index % 23 * 2 : index % 23 * 2 + 4] = RED
    return frames


def picture(path: Path, shade: int = 90) -> Path:
    Image.new("RGB", (48, 32), (shade, 10, 200)).save(path)
    return path


def entry(path: Path, latent: Any, noise: Any, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "latent": latent, "noise": noise, **more}


def test_image_to_video_writes_clip_sheet_and_record(model: Path, here: Path) -> None:
    picture(here / "first.png")
    result = run("a red circle moves right", "--model", model, "--image", "first.png", "--image-noise", "0.2")
    assert result.exit_code == 0, result.output
    assert sorted(entry.name for entry in here.iterdir()) == ["clip.json", "clip.mp4", "clip.png", "first.png"]
    assert video.read_video("clip.mp4").shape == (17, 32, 48, 3)
    with Image.open("clip.png") as sheet:
        assert sheet.width * 32 == sheet.height * 48
    task, wrote, spent = result.stdout.splitlines()
    assert task.startswith("image-to-video: 17 frames of 48x32 at 8 per second, tiny, 2 steps")
    assert wrote == "wrote clip.mp4, clip.png, clip.json"
    assert [part.split()[-3 if part.startswith("time") else 0] for part in spent.split(", ")] == [
        "load", "text", "encode", "denoise", "decode", "write",
    ]  # fmt: skip
    record = json.loads((here / "clip.json").read_text())
    assert record["conditions"] == [entry(here / "first.png", 0, 0.2)]
    assert (
        record | {**DEFAULTS, "seed": 0, "compat": "reference", "fit": "crop", "tiling": "whole", "lora": None}
        == record
    )
    assert (record["task"], record["model"], record["device"], record["dtype"]) == (
        "image-to-video",
        str(model),
        "cpu",
        "float32",
    )
    assert record["prompt"] == "a red circle moves right"
    assert record["versions"]["torch"].startswith("2.")
    weights = hashlib.sha256((model / "dit.safetensors").read_bytes()).hexdigest()
    assert record["hashes"]["model"]["dit.safetensors"] == weights
    assert {"lora.safetensors", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"} <= set(
        record["hashes"]["model"]
    )


def test_the_clip_is_what_the_pipeline_gives_and_comes_again(model: Path, here: Path) -> None:
    assert (
        run(
            "a red circle", "--model", model, "--image", picture(here / "first.png"), "--seed", "3", "--out", "a/"
        ).exit_code
        == 0
    )
    pipe = Pipeline.from_pretrained(model)
    expected = pipe("a red circle", conditions=[Condition(here / "first.png")], seed=3)
    assert torch.equal(video.read_video("a"), expected)
    assert (
        run("a red circle", "--model", model, "--image", here / "first.png", "--seed", "3", "--out", "b/").exit_code
        == 0
    )
    assert torch.equal(video.read_video("b"), expected)


def test_from_makes_the_clip_again_and_options_win(model: Path, here: Path) -> None:
    picture(here / "first.png")
    picture(here / "last.png", 200)
    more = (
        "--end-image",
        "last.png",
        "--end-noise",
        "0.4",
        "--steps",
        "3",
        "--guidance",
        "1",
        "--seed",
        "9",
        "--lora",
        "none",
        "--fit",
        "pad",
    )
    record = make(model, "--image", "first.png", *more)
    assert record["task"] == "start-end"
    assert record["conditions"] == [entry(here / "first.png", 0, 0.0), entry(here / "last.png", -1, 0.4)]
    assert record["lora"] == {}
    before = (here / "clip.mp4").read_bytes()
    refused = run("--from", "clip.json")
    assert refused.exit_code == 2
    assert "clip.mp4 exists" in refused.stderr
    assert run("--from", "clip.json", "--overwrite").exit_code == 0
    again = json.loads((here / "clip.json").read_text())
    # First the frames, then the file: a difference says whether the model or the encoder made it.
    assert again["hashes"] == record["hashes"]
    assert (here / "clip.mp4").read_bytes() == before
    assert run("--from", "clip.json", "--out", "again.mp4").exit_code == 0
    assert (here / "again.mp4").read_bytes() == before
    assert run("--from", "clip.json", "--out", "other.mp4", "--seed", "10").exit_code == 0
    assert (here / "other.mp4").read_bytes() != before
    assert run("--from", "clip.json", "--out", "one.mp4", "--image", "last.png", "--frames", "9").exit_code == 0
    assert json.loads((here / "one.json").read_text())["conditions"] == [entry(here / "last.png", 0, 0.0)]
    assert len(video.read_video("one.mp4")) == 9
    record["hashes"]["model"]["vae.safetensors"] = "0" * 64
    (here / "clip.json").write_text(json.dumps(record))
    warned = run("--from", "clip.json", "--overwrite")
    assert warned.exit_code == 0
    assert warned.stderr == "warning: vae.safetensors is not the file that the record names: the clip may differ\n"


def test_several_seeds_make_a_clip_each(model: Path, here: Path) -> None:
    result = run("a red circle", "--model", model, "--seed", "1,2", "--seed", "3", "--frames", "5", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert sorted(here.glob("*.mp4")) == [here / f"clip-{seed}.mp4" for seed in (1, 2, 3)]
    assert len({path.read_bytes() for path in here.glob("*.mp4")}) == 3
    assert run("a red circle", "--model", model, "--seed", "2", "--frames", "5", "--steps", "1").exit_code == 0
    assert (here / "clip.mp4").read_bytes() == (here / "clip-2.mp4").read_bytes()
    assert json.loads((here / "clip-2.json").read_text())["seed"] == 2


def test_keyframes_at_any_latent_and_names_with_marks(model: Path, here: Path) -> None:
    odd = picture(here / "a@b:c.png")
    record = make(model, "--keyframe", f"{odd}@2:0.3", "--keyframe", f"{odd}@-1")
    assert record["conditions"] == [entry(odd, 2, 0.3), entry(odd, -1, 0.0)]


def test_completion_keeps_latents_of_a_clip(model: Path, here: Path) -> None:
    video.write_video("given/", clip(17), FPS)
    record = make(model, "--video", "given", "--keep", "0,3-4", "--keep-noise", "0,0.3,0.3")
    assert record["conditions"] == [entry(here / "given", [0, 3, 4], [0.0, 0.3, 0.3], source=[0, 3, 4])]
    assert (record["task"], record["written"]) == ("completion", [{"generated": [0, None]}])


def test_extension_goes_on_from_the_last_frames(model: Path, here: Path) -> None:
    frames = clip(21)
    video.write_video("given/", frames, FPS)
    video.write_video("twice.mp4", frames.repeat_interleave(2, 0), 2 * FPS)
    assert run("a red circle", "--model", model, "--extend", "given", "--overlap", "9", "--out", "long/").exit_code == 0
    record = json.loads((here / "long.json").read_text())
    assert record["conditions"] == [entry(here / "given", [0, 1, 2], [0.0, 0.3, 0.4], source=[0, 1, 2], last_frames=9)]
    assert record["task"] == "extension"
    long = video.read_video("long")
    assert len(long) == 21 + 17 - 9
    assert torch.equal(long[:21], frames)  # the clip's own frames, not their reconstruction
    pipe = Pipeline.from_pretrained(model)
    made = pipe("a red circle", conditions=[Condition(frames[-9:], (0, 1, 2), (0.0, 0.3, 0.4))])
    assert torch.equal(long[21:], made[9:])
    # A clip of twice the rate is brought to the clip's own; the default overlap is 13 frames, its
    # noise the table's.
    assert run("a red circle", "--model", model, "--extend", "twice.mp4", "--out", "clip.gif").exit_code == 0
    assert len(video.read_video("clip.gif", fps=FPS)) == 21 + 17 - 13
    assert json.loads((here / "clip.json").read_text())["conditions"][0]["noise"] == [0.0, 0.3, 0.4, 0.5]


def test_transition_joins_two_clips(model: Path, here: Path) -> None:
    first, second = clip(10), clip(12, shade=60)
    video.write_video("first/", first, FPS)
    video.write_video("second/", second, FPS)
    command = (
        "a red circle",
        "--model",
        model,
        "--transition",
        "first",
        "second",
        "--ends",
        "2",
        "--frames",
        "25",
        "--out",
        "joined/",
    )
    result = run(*command)
    assert result.exit_code == 0, result.output
    record = json.loads((here / "joined.json").read_text())
    assert record["conditions"] == [
        entry(here / "first", [0, 1], [0.0, 0.0], source=[0, 1], last_frames=5),
        entry(here / "second", [-2, -1], [0.0, 0.0], source=[1, 2]),
    ]
    assert record["task"] == "transition"
    given = [Condition(first[-5:], (0, 1)), Condition(second[:9], (-2, -1), source=(1, 2))]
    made = Pipeline.from_pretrained(model)("a red circle", conditions=given, num_frames=25)
    # Generated frames 0-4 are the first clip's last five; 17-24 are frames 1-8 of the second, so
    # that 16 is its frame 0.
    assert torch.equal(video.read_video("joined"), torch.cat([first, made[5:16], second]))
    assert run("--from", "joined.json", "--out", "again/").exit_code == 0
    assert torch.equal(video.read_video("again"), video.read_video("joined"))


def test_transition_of_a_clip_into_itself(model: Path, here: Path) -> None:
    video.write_video("loop/", clip(9), FPS)
    record = make(model, "--transition", "loop", "loop", "--keep-noise", "0.1")
    assert [condition["noise"] for condition in record["conditions"]] == [[0.1, 0.1], [0.1, 0.1]]


def test_media_of_another_size_are_fitted(model: Path, here: Path) -> None:
    frames = clip(13, size=(96, 32))
    video.write_video("wide/", frames, FPS)
    assert (
        run(
            "a red circle", "--model", model, "--extend", "wide", "--overlap", "5", "--fit", "pad", "--out", "long/"
        ).exit_code
        == 0
    )
    assert torch.equal(video.read_video("long")[:13], video.fit(frames, (48, 32), "pad"))


def test_lora_by_path_replaces_the_models_own(model: Path, here: Path) -> None:
    made = {}
    for name, words in {
        "own": (),
        "none": ("--lora", "none"),
        "twice": ("--lora", f"{model}/lora.safetensors:2"),
    }.items():
        assert run("a red circle", "--model", model, *words, "--out", f"{name}/").exit_code == 0
        made[name] = video.read_video(name)
    assert not torch.equal(made["own"], made["none"])
    assert not torch.equal(made["own"], made["twice"])
    record = json.loads((here / "twice.json").read_text())
    path = str(model / "lora.safetensors")
    assert record["lora"] == {path: 2.0}
    assert record["hashes"]["lora"] == {path: hashlib.sha256((model / "lora.safetensors").read_bytes()).hexdigest()}


def test_a_lora_for_another_model_is_refused(model: Path, here: Path) -> None:
    result = run("a red circle", "--model", model, "--lora", model / "other_lora.safetensors")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "other_lora.safetensors" in line
    assert "does not fit this model" in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("--size", "32x64"),
        ("--tiling", "feather"),
        ("--tiling", "exact"),
        ("--tiling", "auto"),
        ("--compat", "exact"),
        ("--dtype", "bfloat16"),
    ],
)
def test_other_settings_are_recorded(model: Path, here: Path, words: tuple[str, str]) -> None:
    record = make(
        model, *words, "--frames", "5", "--fps", "12", "--negative", "gray", "--shift", "5", "--attention", "sdpa"
    )
    assert (record["num_frames"], record["fps"], record["negative_prompt"], record["shift"]) == (5, 12.0, "gray", 5.0)
    name, value = words[0].removeprefix("--"), words[1]
    assert (f"{record['width']}x{record['height']}" if name == "size" else record[name]) == value
    assert video.probe("clip.mp4").fps == 12


def test_the_program_itself(model: Path, here: Path) -> None:
    program = [sys.executable, "-m", "pusa_fast.cli", "generate"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    good = subprocess.run([*program, "a red circle", "--model", model], capture_output=True, text=True, env=environment)
    assert (good.returncode, good.stderr) == (0, "")
    assert sorted(entry.name for entry in here.iterdir()) == ["clip.json", "clip.mp4", "clip.png"]


@pytest.mark.parametrize("count", [1, 2, 64, 65, 81, 500])
def test_thinning_keeps_both_ends(count: int) -> None:
    frames = torch.arange(count)[:, None]
    thinned = Thinned(iter(frames), limit=16)
    assert [frame.item() for frame in thinned] == list(range(count))
    kept = thinned.kept()[:, 0].tolist()
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) <= 18
