"""Files that cannot be loaded: one line that names what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_files import TINY, Golden, Manifest, assert_holds, indexed, official_folder, pth, single
from pusa_fast.weights import load_dit, load_text_encoder_state, load_vae


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_missing_and_misshapen_are_all_named(state: dict[str, Tensor]) -> None:
    state["blocks.0.extra.weight"] = torch.zeros(2)
    del state["blocks.1.norm3.bias"], state["blocks.1.self_attn.k.weight"]
    state["head.head.bias"] = torch.zeros(5)
    state["blocks.0.self_attn.v.bias"] = torch.zeros(23)
    with pytest.raises(ValueError) as error:
        load_dit(state, TINY)
    text = one_line(error)
    assert "1 unknown: blocks.0.extra.weight" in text
    assert "2 missing: blocks.1.self_attn.k.weight, blocks.1.norm3.bias" in text
    assert (
        "2 wrong shape" in text
        and "head.head.bias [5], not [16]" in text
        and "blocks.0.self_attn.v.bias [23], not [24]" in text
    )


def test_long_lists_are_cut(state: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"40 unknown: blocks\.0\.x0\.y, blocks\.0\.x1\.y, blocks\.0\.x10\.y and 37 more"
    ):
        load_dit(state | {f"blocks.0.x{i}.y": torch.zeros(1) for i in range(40)}, TINY)


def test_same_tensor_under_two_names(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="twice"):
        load_dit(state | {"proj_out.bias": state["head.head.bias"]}, TINY)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        load_dit(tmp_path / "absent.safetensors", TINY)


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("size", [0, 5, 200, 20_000])
@pytest.mark.parametrize("write", [single, pth])
def test_truncated_file(write: Callable[..., Path], size: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = cut(write(tmp_path, state), size)
    with pytest.raises(ValueError, match="damaged") as error:
        load_dit(path, TINY)
    assert str(path) in one_line(error)


def test_garbage_and_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_dit(path, TINY)
    path.write_bytes(bytes(range(256)) * 8)
    with pytest.raises(ValueError, match="damaged"):
        load_dit(path, TINY)


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_pickles_run_no_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": Payload()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth is damaged or not a table of tensors") as error:
        load_dit(tmp_path / "x.pth", TINY)
    one_line(error)
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"), [([1, 2], "holds a list"), ({"a": 3}, "not a plain table"), ({}, "no tensors")]
)
def test_pickle_of_something_else(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_dit(tmp_path / "x.pth", TINY)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"cannot read \.gguf"):
        load_dit(tmp_path / "x.gguf", TINY)


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not a directory of a Wan transformer: looked for dit\.safetensors, transformer/"
    ):
        load_dit(tmp_path)
    with pytest.raises(ValueError, match=r"not a directory of a Wan VAE: looked for vae\.safetensors"):
        load_vae(tmp_path)
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(ValueError, match="one of its experts: high_noise_model"):
        load_dit(tmp_path)


def test_missing_shards(state: dict[str, Tensor], tmp_path: Path) -> None:
    official_folder(tmp_path, state)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks diffusion_pytorch_model-00002-of-00003"):
        load_dit(tmp_path, TINY)
    with pytest.raises(ValueError, match="one shard of several: give its directory"):
        load_dit(tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors", TINY)


def test_bad_index(state: dict[str, Tensor], tmp_path: Path) -> None:
    indexed(tmp_path, state)
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names part1\.safetensors, not in"):
        load_dit(tmp_path, TINY)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not a shard index"):
        load_dit(tmp_path, TINY)


def test_overlapping_shards(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = single(tmp_path, state)
    with pytest.raises(ValueError, match="another shard"):
        load_dit([path, path], TINY)
    with pytest.raises(ValueError, match="no path given"):
        load_dit([], TINY)


def test_other_kinds_are_recognised(golden: Golden, state: dict[str, Tensor], manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="not a Wan transformer but a Wan VAE"):
        load_dit(golden("vae_weights"))
    with pytest.raises(ValueError, match="not a Wan VAE but a Wan transformer"):
        load_vae(state)
    with pytest.raises(ValueError, match="is a LoRA"):
        load_dit(golden("lora"))
    with pytest.raises(ValueError, match="unknown: it holds a, b"):
        load_dit({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Wan2\.2-5B"):
        load_vae({"encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.zeros(1)})
    with pytest.raises(ValueError, match="no UMT5 encoder"):
        load_text_encoder_state(state)


@pytest.mark.parametrize(
    "key",
    [
        "img_emb.proj.1.weight",
        "blocks.0.cross_attn.k_img.weight",
        "condition_embedder.image_embedder.norm1.weight",
        "vace_patch_embedding.weight",
    ],
)
def test_image_input_variants_are_named(state: dict[str, Tensor], key: str) -> None:
    with pytest.raises(
        ValueError, match=r"image-input variant .*Pusa conditions a text-to-video model by its timesteps"
    ):
        load_dit(state | {key: torch.zeros(1)}, TINY)


def test_quantised_files_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantised \(scaled_fp8"):
        load_dit(state | {"scaled_fp8": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match="quantised"):
        load_dit(state | {"blocks.0.ffn.0.scale_weight": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match="quantised"):
        load_dit(state | {"head.head.bias": torch.zeros(16, dtype=torch.int8)}, TINY)
    narrow = {n: t.to(torch.float8_e4m3fn) for n, t in state.items()}
    path = single(tmp_path, narrow)
    with pytest.raises(ValueError, match="pass dtype"):
        load_dit(path, TINY)
    assert_holds(load_dit(path, TINY, dtype=torch.bfloat16), narrow, torch.bfloat16)


def test_a_precision_that_cannot_run_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="precision fp8 cannot be used: fp8 needs an NVIDIA GPU"):
        load_dit("/nowhere", TINY, precision="fp8")
    with pytest.raises(ValueError, match="precision 'int8' does not exist: choose fp8"):
        load_dit("/nowhere", TINY, precision="int8")
    with pytest.raises(ValueError, match=r"runs in bfloat16 around its products, got dtype torch.float16"):
        load_dit("/nowhere", TINY, precision="fp8", dtype=torch.float16)
