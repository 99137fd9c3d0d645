"""Loading: every layout and container gives the same model; every bad file is one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pusa_fast.config import MODELS, DiTConfig, VAEConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.weights import checkpoint, keymap, load_dit, load_text_encoder_state, load_vae
from pusa_fast.weights.files import file_hash

Golden = Callable[[str], dict[str, Tensor]]
Manifest = Callable[[str], Any]
TINY = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=8)
DIFFUSERS = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2,
    "in_channels": 4, "out_channels": 4, "text_dim": 10, "freq_dim": 8, "eps": 1e-6, "patch_size": [1, 2, 2], "image_dim": None,
    "added_kv_proj_dim": None, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Random weights of TINY under official names."""
    model = WanDiT(TINY)
    return {name: torch.randn_like(tensor) for name, tensor in keymap.unpack(model.state_dict()).items()}


def assert_holds(model: torch.nn.Module, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    held = keymap.unpack(model.state_dict())
    assert held.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(held[name], tensor.to(dtype or tensor.dtype)), name


def metas(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}


# --- every published layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("wan2.1-t2v-14b", "wan2.1-t2v-14b"),
        ("wan2.1-t2v-14b-diffusers", "wan2.1-t2v-14b"),
        ("wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b"),
        ("wan2.2-ti2v-5b", "wan2.2-ti2v-5b"),
    ],
)
def test_transformer_manifests_load_onto_meta(manifest: Manifest, name: str, model: str) -> None:
    dit = load_dit(metas(manifest(name)), device="meta")
    assert dit.config == MODELS[model]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in dit.parameters())
    assert {n: list(t.shape) for n, t in keymap.unpack(dit.state_dict()).items()} == manifest(model)


@pytest.mark.parametrize("name", ["wan2.1-vae", "wan2.1-vae-diffusers"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_vae_manifests_load_onto_meta(manifest: Manifest, name: str, prefix: str) -> None:
    vae = load_vae({prefix + key: tensor for key, tensor in metas(manifest(name)).items()}, device="meta")
    assert vae.config == VAEConfig()
    assert {n: list(p.shape) for n, p in vae.named_parameters()} == manifest("wan2.1-vae")


def test_packing_puts_rows_in_order(state: dict[str, Tensor]) -> None:
    block = load_dit(state, TINY).blocks[1]
    for leaf in ("weight", "bias"):
        own = [state[f"blocks.1.self_attn.{p}.{leaf}"] for p in "qkv"]
        assert torch.equal(getattr(block.self_attn.qkv, leaf), torch.cat(own))
        other = [state[f"blocks.1.cross_attn.{p}.{leaf}"] for p in "kv"]
        assert torch.equal(getattr(block.cross_attn.kv, leaf), torch.cat(other))


def test_packed_layout_loads(state: dict[str, Tensor]) -> None:
    packed = load_dit(state, TINY).state_dict()
    assert "blocks.0.self_attn.qkv.weight" in packed
    assert_holds(load_dit(packed, TINY), state)


# --- every container --------------------------------------------------------------------------------------------------


def shards(state: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{n: state[n].contiguous() for n in names[i::count]} for i in range(count)]


def single(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "any.safetensors")
    return folder / "any.safetensors"


def pth(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "any.pth")
    return folder / "any.pth"


def pth_wrapped(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()}, "step": 3}, folder / "any.ckpt")
    return folder / "any.ckpt"


def pth_old(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "any.pt", _use_new_zipfile_serialization=False)
    return folder / "any.pt"


def shard_list(folder: Path, state: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"part{i}.safetensors" for i in range(3)]
    for path, part in zip(paths, shards(state, 3), strict=True):
        save_file(part, path)
    return paths


def official_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """As Wan2.1-T2V-14B is published, the VAE beside it."""
    for i, part in enumerate(shards(state, 3), 1):
        save_file(part, folder / f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors")
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")
    return folder


def indexed(folder: Path, state: dict[str, Tensor]) -> Path:
    parts = shards(state, 2)
    weight_map = {n: f"part{i}.safetensors" for i, part in enumerate(parts) for n in part}
    for i, part in enumerate(parts):
        save_file(part, folder / f"part{i}.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def index_file(folder: Path, state: dict[str, Tensor]) -> Path:
    return indexed(folder, state) / "diffusion_pytorch_model.safetensors.index.json"


def nano_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({"x": torch.zeros(1)}, folder / "vae.safetensors")
    save_file(state, folder / "dit.safetensors")
    return folder


def diffusers_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    inner = folder / "transformer"
    inner.mkdir()
    save_file({keymap.dit_to_diffusers(n): t for n, t in state.items()}, inner / "diffusion_pytorch_model.safetensors")
    return folder


CONTAINERS = [
    single,
    pth,
    pth_wrapped,
    pth_old,
    shard_list,
    official_folder,
    indexed,
    index_file,
    nano_folder,
    diffusers_folder,
]


@pytest.mark.parametrize("write", CONTAINERS)
def test_containers(write: Callable[[Path, dict[str, Tensor]], Any], state: dict[str, Tensor], tmp_path: Path) -> None:
    assert_holds(load_dit(write(tmp_path, state), TINY), state)


def test_golden_weights_load(golden: Golden, golden_meta: dict[str, Any], tmp_path: Path) -> None:
    weights = golden("vae_weights")
    torch.save({f"model.{n}": t for n, t in weights.items()}, tmp_path / "Wan2.1_VAE.pth")
    meta = golden_meta["vae"]
    config = VAEConfig(
        meta["dim"], meta["z_dim"], tuple(meta["dim_mult"]), meta["num_res_blocks"], tuple(meta["temperal_downsample"])
    )
    assert_holds(load_vae(tmp_path, config), weights)


# --- dtype, device, ownership -----------------------------------------------------------------------------------------


def test_dtype_none_keeps_what_is_stored(state: dict[str, Tensor], tmp_path: Path) -> None:
    mixed = {n: t.bfloat16() if n.startswith("blocks.") and "modulation" not in n else t for n, t in state.items()}
    dit = load_dit(single(tmp_path, mixed), TINY)
    assert dit.blocks[0].self_attn.qkv.weight.dtype == torch.bfloat16
    assert dit.blocks[0].modulation.dtype == torch.float32
    assert_holds(dit, mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_converts(state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    dit = load_dit(single(tmp_path, state), TINY, dtype=dtype)
    assert {p.dtype for p in dit.parameters()} == {dtype}
    assert_holds(dit, state, dtype)


def test_model_is_ready_for_inference_and_training(state: dict[str, Tensor]) -> None:
    dit = load_dit(state, TINY)
    assert not dit.training
    assert all(type(p) is torch.nn.Parameter and p.requires_grad and p.is_contiguous() for p in dit.parameters())


def test_state_dict_is_not_shared(state: dict[str, Tensor]) -> None:
    before = {n: t.clone() for n, t in state.items()}
    with torch.no_grad():
        for parameter in load_dit(state, TINY).parameters():
            parameter.zero_()
    assert all(torch.equal(state[n], t) for n, t in before.items())


def test_file_is_not_written_through_the_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    for path in (single(tmp_path, state), pth(tmp_path, state)):
        digest = file_hash(path)
        with torch.no_grad():
            for parameter in load_dit(path, TINY).parameters():
                parameter.zero_()
        assert file_hash(path) == digest


def test_meta_tensors_need_device_meta(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="device='meta'"):
        load_dit({n: t.to("meta") for n, t in state.items()}, TINY)


def test_file_onto_meta_reads_no_values(state: dict[str, Tensor], tmp_path: Path) -> None:
    assert all(p.is_meta for p in load_dit(single(tmp_path, state), TINY, device="meta").parameters())


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_from_metadata(state: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "dit.safetensors", state, TINY)
    (tmp_path / "config.json").write_text(json.dumps({**DIFFUSERS, "num_attention_heads": 1, "attention_head_dim": 24}))
    assert load_dit(tmp_path).config == TINY
    other = DiTConfig(**{**asdict(TINY), "num_heads": 6})
    assert load_dit(tmp_path, other).config == other, "the argument comes first"


WAN = {
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
    "num_layers": 2,
    "in_dim": 4,
    "out_dim": 4,
    "freq_dim": 8,
    "text_dim": 10,
    "text_len": 512,
    "eps": 1e-6,
    "model_type": "t2v",
}


@pytest.mark.parametrize("config", [DIFFUSERS, WAN, asdict(TINY)], ids=["diffusers", "official", "ours"])
def test_config_beside_the_file(state: dict[str, Tensor], tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_dit(single(tmp_path, state)).config == TINY


def test_vae_config_beside_the_file(golden: Golden, golden_meta: dict[str, Any], tmp_path: Path) -> None:
    meta = golden_meta["vae"]
    config = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": meta["dim"],
        **{k: meta[k] for k in ("z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")},
    }
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({**config, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16})
    )
    save_file(golden("vae_weights"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    vae = load_vae(tmp_path)
    assert (vae.config.base_dim, vae.config.num_res_blocks, vae.config.latents_std) == (8, 1, (2.0,) * 16)


def test_config_of_another_kind_is_passed_over(golden: Golden, tmp_path: Path) -> None:
    """The official folder's config.json is the transformer's, and the VAE lies in it too."""
    (tmp_path / "config.json").write_text(json.dumps(WAN))
    torch.save(golden("vae_weights"), tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=r"carries no configuration: pass config=VAEConfig\("):
        load_vae(tmp_path)
    assert load_vae(tmp_path, VAEConfig(8, num_res_blocks=1)).config.base_dim == 8


def test_unknown_configuration_asks_for_the_heads(state: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"dim=24, ffn_dim=40, num_heads=\?, num_layers=2, in_channels=4.*text_dim=10, freq_dim=8"
    ):
        load_dit(state)


def test_published_sizes_with_a_tensor_missing_name_it(manifest: Manifest) -> None:
    tensors = metas(manifest("wan2.1-t2v-1.3b"))
    del tensors["blocks.3.ffn.2.bias"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.3\.ffn\.2\.bias"):
        load_dit(tensors, device="meta")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        (json.dumps({k: v for k, v in WAN.items() if k != "dim"}), "incomplete"),
        (json.dumps({**WAN, "model_type": "i2v"}), "image-input"),
        (json.dumps({**WAN, "num_heads": 7}), "multiple"),
    ],
)
def test_bad_config(state: dict[str, Tensor], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dit(single(tmp_path, state))


# --- errors -----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"x\.pth is damaged or no table of tensors") as error:
        load_dit(tmp_path / "x.pth", TINY)
    one_line(error)
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"), [([1, 2], "holds a list"), ({"a": 3}, "no plain table"), ({}, "no tensors")]
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
        ValueError, match=r"no directory of a Wan transformer: looked for dit\.safetensors, transformer/"
    ):
        load_dit(tmp_path)
    with pytest.raises(ValueError, match=r"no directory of a Wan VAE: looked for vae\.safetensors"):
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
    with pytest.raises(ValueError, match="no shard index"):
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


# --- text encoder, saving ---------------------------------------------------------------------------------------------


def test_text_encoder_layouts(tmp_path: Path, manifest: Manifest) -> None:
    wanted = manifest("umt5-xxl-encoder-transformers")
    loaded = load_text_encoder_state(metas(manifest("umt5-xxl-encoder-original")), device="meta")
    assert {n: list(t.shape) for n, t in loaded.items()} == wanted
    assert loaded["shared.weight"] is loaded["encoder.embed_tokens.weight"]
    small = {
        n: torch.randn(2, 3)
        for n in manifest("umt5-xxl-encoder-original")
        if "blocks.1" not in n and "blocks.2" not in n
    }
    torch.save(small, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    from_folder = load_text_encoder_state(tmp_path, dtype=torch.bfloat16)
    gate = small["blocks.3.ffn.gate.0.weight"].bfloat16()
    assert torch.equal(from_folder["encoder.block.3.layer.1.DenseReluDense.wi_0.weight"], gate)


def test_save_writes_loadable_unpacked_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    dit = load_dit(state, TINY)
    checkpoint.save(tmp_path / "dit.safetensors", keymap.unpack(dit.state_dict()), TINY, {"note": "x"})
    assert load_file(tmp_path / "dit.safetensors").keys() == state.keys()
    assert_holds(load_dit(tmp_path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["dit.safetensors"]


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"a": torch.ones(2)})

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pusa_fast.weights.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"a": torch.zeros(2)})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(FileNotFoundError, match="is no directory"):
        checkpoint.save(tmp_path / "no" / "a.safetensors", {"a": torch.zeros(2)})


def test_config_metadata_round_trip(tmp_path: Path, golden: Golden) -> None:
    config = VAEConfig(8, 16, (1, 2, 4, 4), 1)
    checkpoint.save(tmp_path / "vae.safetensors", golden("vae_weights"), config)
    assert load_vae(tmp_path).config == config


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
