"""Loading a pipeline: every layout, LoRAs, and what is refused before any weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pusa_fast import Pipeline
from pusa_fast.weights.pretrained import WAN_DEFAULTS, find_model
from tiny_pipeline import DEFAULTS, write_model


@pytest.fixture(scope="module")
def nano_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(nano_like: Path) -> Pipeline:
    return Pipeline.from_pretrained(nano_like, device="cpu")


def changed(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copy = shutil.copytree(folder, tmp_path / "copy")
    spec = json.loads((copy / "model.json").read_text())
    change(spec)
    (copy / "model.json").write_text(json.dumps(spec))
    return copy


def test_nano_layout(pipe: Pipeline, nano_like: Path) -> None:
    assert pipe.defaults == DEFAULTS and pipe.spec["training"] == {"seed": 0}
    assert pipe.files is not None and pipe.files.name == "tiny"
    assert [(path.name, handle.strength) for path, handle in pipe.loras.items()] == [("pusa_lora.safetensors", 1.0)]
    assert pipe.dit.dtype == pipe.vae.dtype == torch.float32 and pipe.device.type == "cpu"
    assert not pipe.dit.training and not pipe.vae.training


def test_lora_choices(pipe: Pipeline, nano_like: Path) -> None:
    bare = Pipeline.from_pretrained(nano_like, lora={}, device="cpu")
    twice = Pipeline.from_pretrained(nano_like, lora={str(nano_like / "pusa_lora.safetensors"): 2.0}, device="cpu")
    assert bare.loras == {} and next(iter(twice.loras.values())).strength == 2.0
    base, one, two = (p("a red circle", output="latents") for p in (bare, pipe, twice))
    assert not torch.equal(base, one) and not torch.equal(one, two)
    next(iter(twice.loras.values())).set_strength(1.0)
    assert torch.equal(twice("a red circle", output="latents"), one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": {"nowhere.safetensors": 1.0}}, "LoRA nowhere.safetensors does not exist"),
        ({"lora": {"model.json": float("nan")}}, "strength must be a number, got nan"),
        ({"attention": "fa9"}, "attention backend 'fa9' does not exist"),
        ({"device": "gpu"}, "unknown device 'gpu': use cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, r"device cuda:99 does not exist here \(\d CUDA devices\)"),
    ],
)
def test_loading_refused_before_weights_are_read(
    nano_like: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(nano_like)
    monkeypatch.setattr("pusa_fast.weights.load_dit", None, raising=False)
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(nano_like, **given)


def test_dtype(nano_like: Path) -> None:
    pipe = Pipeline.from_pretrained(nano_like, device="cpu", dtype=torch.bfloat16)
    assert pipe.dit.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert pipe("a red circle", output="latents").dtype == torch.float32


@pytest.mark.parametrize("encoder", ["directory", "original file"])
def test_diffusers_and_official_layouts(pipe: Pipeline, nano_like: Path, tmp_path: Path, encoder: str) -> None:
    """The same weights, laid out as the others do, give the same latents."""
    folder = tmp_path / "wan"
    weights = {name: nano_like / f"{name}.safetensors" for name in ("dit", "vae")}
    if encoder == "directory":
        places = {
            "dit": "transformer/diffusion_pytorch_model.safetensors",
            "vae": "vae/diffusion_pytorch_model.safetensors",
        }
        shutil.copytree(nano_like / "text_encoder", folder / "text_encoder")
        shutil.copytree(nano_like / "tokenizer", folder / "tokenizer")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    else:
        places = {"dit": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.safetensors"}
        shutil.copytree(nano_like / "tokenizer", folder / "google" / "umt5-xxl")
        shutil.copy(
            nano_like / "text_encoder" / "model.safetensors", folder / "models_t5_umt5-xxl-enc-bf16.safetensors"
        )
    for part, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights[part], folder / place)
    other = Pipeline.from_pretrained(folder, lora={nano_like / "pusa_lora.safetensors": 1.0}, device="cpu")
    assert (
        other.defaults == dict(WAN_DEFAULTS) and other.text_encoder is not None and other.text_encoder.text_len == 512
    )
    other.text_encoder.text_len = 8
    given = {key: value for key, value in DEFAULTS.items() if key != "fps"}
    assert torch.equal(other("a red circle", output="latents", **given), pipe("a red circle", output="latents"))


def test_not_a_model(tmp_path: Path) -> None:
    looked = (
        r"looked in it for model\.json, model_index\.json, Wan2\.1_VAE\.pth, Wan2\.1_VAE\.safetensors; or give \"nano\""
    )
    with pytest.raises(ValueError, match=rf"\(a directory\) is not a model: {looked}"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match=rf"nowhere \(missing\) is not a model: {looked}"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights\.bin \(a file\) is not a model"):
        find_model(tmp_path / "weights.bin")
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(ValueError, match=r"each expert of Wan2\.2 is a transformer"):
        find_model(tmp_path)


def test_incomplete_models(nano_like: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(nano_like, tmp_path / "copy")
    (copy / "vae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"copy is incomplete: vae\.safetensors is missing"):
        find_model(copy)
    (tmp_path / "Wan2.1_VAE.pth").touch()
    with pytest.raises(ValueError, match=r"incomplete: models_t5_umt5-xxl-enc-bf16\.pth is missing"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("dit"), "model.json lacks or misshapes an entry .'dit'.: restore the file"),
        (lambda spec: spec.update(text="t5"), "model.json lacks or misshapes an entry"),
        (lambda spec: spec["defaults"].update(cfg=3), "unknown defaults cfg: use num_frames"),
    ],
)
def test_broken_model_json(
    nano_like: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_model(changed(nano_like, tmp_path, change))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"_class_name": "FluxPipeline"}', '{"_class_name": "WanPipeline", "transformer_2": ["a", "b"]}'],
)
def test_other_model_index_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"not valid JSON|must hold a JSON object|not of a Wan pipeline|holds two experts"
    ):
        find_model(tmp_path)
