"""Loading and saving: every layout and container gives the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dit_files import (
    TINY,
    Golden,
    Manifest,
    assert_holds,
    diffusers_folder,
    index_file,
    indexed,
    metas,
    nano_folder,
    official_folder,
    pth,
    pth_old,
    pth_wrapped,
    shard_list,
    single,
)
from pusa_fast.config import MODELS, VAEConfig
from pusa_fast.weights import checkpoint, keymap, load_dit, load_text_encoder_state, load_vae
from pusa_fast.weights.files import file_hash

# --- every published layout -----------------------------------------------------------------------


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


# --- every container ------------------------------------------------------------------------------


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


# --- dtype, device, ownership ---------------------------------------------------------------------


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


# --- text encoder, saving -------------------------------------------------------------------------


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
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        checkpoint.save(tmp_path / "no" / "a.safetensors", {"a": torch.zeros(2)})


def test_config_metadata_round_trip(tmp_path: Path, golden: Golden) -> None:
    config = VAEConfig(8, 16, (1, 2, 4, 4), 1)
    checkpoint.save(tmp_path / "vae.safetensors", golden("vae_weights"), config)
    assert load_vae(tmp_path).config == config


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
