"""Renaming tables against the manifests of published files and against diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pusa_fast.config import DiTConfig, VAEConfig
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.weights import keymap, load_dit, load_vae

Manifest = Callable[[str], Any]
TINY = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=10, freq_dim=8)
PREFIXES = (
    "", "model.", "model.diffusion_model.", "diffusion_model.", "module.", "pipe.dit.", "_forward_module.pipe.dit.",
    "base_model.model.", "transformer.", "_orig_mod.", "module._orig_mod.",
)  # fmt: skip


def test_diffusers_transformer_manifest_maps_onto_the_official_one_and_back(manifest: Manifest) -> None:
    official, diffusers = manifest("wan2.1-t2v-14b"), manifest("wan2.1-t2v-14b-diffusers")
    assert {keymap.dit_to_official(name): shape for name, shape in diffusers.items()} == official
    assert {keymap.dit_to_diffusers(name): shape for name, shape in official.items()} == diffusers


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"])
def test_official_names_pass_unchanged(manifest: Manifest, name: str) -> None:
    assert all(keymap.dit_to_official(key) == key for key in manifest(name))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["wan2.1-t2v-14b", "wan2.1-t2v-14b-diffusers"])
def test_prefixes_are_stripped(manifest: Manifest, prefix: str, layout: str) -> None:
    names = manifest(layout)
    assert {keymap.dit_to_official(prefix + name) for name in names} == set(manifest("wan2.1-t2v-14b"))
    assert keymap.dit_layout(prefix + name for name in names) == ("diffusers" if "diffusers" in layout else "official")


def test_layouts_are_told_apart(manifest: Manifest) -> None:
    assert keymap.dit_layout(WanDiT(TINY).state_dict()) == "packed"
    assert keymap.dit_layout(manifest("wan2.1-vae")) is None
    assert keymap.dit_layout(manifest("umt5-xxl-encoder-original")) is None
    assert keymap.vae_layout(manifest("wan2.1-vae")) == "official"
    assert keymap.vae_layout(manifest("wan2.1-vae-diffusers")) == "diffusers"
    assert keymap.vae_layout(manifest("wan2.1-t2v-14b")) is None
    assert keymap.vae_layout(["encoder.downsamples.0.downsamples.0.residual.0.gamma"]) == "wan2.2"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_vae_manifests(manifest: Manifest, prefix: str) -> None:
    official, diffusers = manifest("wan2.1-vae"), manifest("wan2.1-vae-diffusers")
    for stored in (official, diffusers):
        names = keymap.vae_names_to_official(prefix + name for name in stored)
        assert {names[prefix + name]: shape for name, shape in stored.items()} == official
    assert {keymap.vae_to_diffusers(name, 4, 2): shape for name, shape in official.items()} == diffusers


@pytest.mark.parametrize(
    ("dim_mult", "num_res_blocks", "temporal"),
    [
        ((1, 2, 4, 4), 2, (False, True, True)),
        ((1, 2), 1, (True,)),
        ((1, 1, 2), 3, (False, True)),
        ((2, 1, 1, 2, 2), 1, (True, False, True, False)),
    ],
)
def test_vae_of_any_depth_matches_diffusers(
    dim_mult: tuple[int, ...], num_res_blocks: int, temporal: tuple[bool, ...]
) -> None:
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

    config = VAEConfig(4, 2, dim_mult, num_res_blocks, temporal, (0.0, 0.0), (1.0, 1.0))
    theirs = AutoencoderKLWan(
        base_dim=4, z_dim=2, dim_mult=list(dim_mult), num_res_blocks=num_res_blocks, temperal_downsample=list(temporal),
        latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0],
    )  # fmt: skip
    stored = theirs.state_dict()
    names = keymap.vae_names_to_official(stored)
    ours = WanVAE(config).state_dict()
    assert {names[n]: t.shape for n, t in stored.items()} == {n: t.shape for n, t in ours.items()}
    assert all(
        keymap.vae_to_diffusers(official, len(dim_mult), num_res_blocks) == name for name, official in names.items()
    )


def test_vae_loaded_from_diffusers_computes_the_same() -> None:
    """Shapes alone would not notice two convolutions of one size exchanged."""
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

    theirs = AutoencoderKLWan(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0, 0.0],
        latents_std=[1.0, 1.0],
    ).eval()
    state = theirs.state_dict()
    for tensor in state.values():
        tensor.normal_(std=0.3)
    ours = load_vae(state, VAEConfig(4, 2, (1, 2, 2), 1, (False, True), (0.0, 0.0), (1.0, 1.0)))
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        latent = theirs.encode(video).latent_dist.mean
        torch.testing.assert_close(ours.encode(video), latent, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(latent), theirs.decode(latent).sample, rtol=1e-4, atol=1e-5)


def test_transformer_goes_to_diffusers_and_back() -> None:
    WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=10,
        freq_dim=8,
        ffn_dim=40,
        num_layers=2,
    ).eval()
    ours = WanDiT(TINY)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    exported = keymap.unpack(ours.state_dict(), keymap.dit_to_diffusers)
    theirs.load_state_dict(exported, strict=True)
    again = load_dit(theirs.state_dict(), TINY)
    assert all(torch.equal(p, ours.get_parameter(n)) for n, p in again.named_parameters())
    x, context = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 5, 10)
    with torch.no_grad():
        expected = theirs(x, torch.tensor([437.0]), context, return_dict=False)[0]
        torch.testing.assert_close(again(x, torch.tensor([437.0]), context), expected, rtol=1e-4, atol=1e-4)


def test_umt5_manifests(manifest: Manifest) -> None:
    original, target = manifest("umt5-xxl-encoder-original"), manifest("umt5-xxl-encoder-transformers")
    mapped = {keymap.umt5_to_transformers(name): shape for name, shape in original.items()}
    del target["encoder.embed_tokens.weight"]  # tied to shared.weight, stored once in the original
    assert mapped == target
    assert all(keymap.umt5_to_transformers(name) == name for name in target)


def test_packed_rows_stand_in_the_order_q_k_v() -> None:
    assert keymap.packed_parts("blocks.7.self_attn.qkv.bias") == tuple(f"blocks.7.self_attn.{p}.bias" for p in "qkv")
    assert keymap.packed_parts("blocks.7.cross_attn.kv.weight") == tuple(
        f"blocks.7.cross_attn.{p}.weight" for p in "kv"
    )
    assert keymap.packed_parts("blocks.7.cross_attn.q.weight") == ("blocks.7.cross_attn.q.weight",)
    rows = keymap.unpack({"blocks.0.self_attn.qkv.bias": torch.arange(6)})
    assert {name[-6]: list(part) for name, part in rows.items()} == {"q": [0, 1], "k": [2, 3], "v": [4, 5]}


def test_unpacked_model_has_the_official_names(manifest: Manifest) -> None:
    with torch.device("meta"):
        model = WanDiT(DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30))
    assert {n: list(t.shape) for n, t in keymap.unpack(model.state_dict()).items()} == manifest("wan2.1-t2v-1.3b")
