"""The VAE against the reference's tensors, streamed in chunks of every length, tiled, and with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pusa_fast import Tiling, VAEConfig, WanVAE
from pusa_fast.model import vae as vae_module
from pusa_fast.testing import relative_error
from pusa_fast.weights import load_vae

GoldenLoader = Callable[[str], dict[str, Tensor]]
SMALL = VAEConfig(base_dim=8, num_res_blocks=1)


@pytest.fixture(scope="module")
def vae(golden: GoldenLoader) -> WanVAE:
    return load_vae(golden("vae_weights"), config=SMALL)


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("case", ["f1", "f5", "f17"])
def test_streams_like_the_reference_at_any_chunk_length(
    vae: WanVAE, golden: GoldenLoader, case: str, frames_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_module, "_CHUNK_LATENT_PIXELS", frames_per_chunk * 4 * 6)
    g = golden("vae")
    assert relative_error(vae.encode(g[f"{case}.video"]), g[f"{case}.latent"]) < 1e-5
    assert relative_error(vae.decode(g[f"{case}.latent"]), g[f"{case}.decoded"]) < 1e-5


def test_feathered_tiles_match_the_reference(vae: WanVAE, golden: GoldenLoader) -> None:
    g, tiling = golden("vae"), Tiling(tile=(8, 8), stride=(4, 6))
    assert relative_error(vae.encode(g["tiled.video"], tiling), g["tiled.latent"]) < 1e-5
    assert relative_error(vae.decode(g["tiled.latent"], tiling), g["tiled.decoded"]) < 1e-5


def test_one_tile_that_covers_everything_changes_nothing(vae: WanVAE, golden: GoldenLoader) -> None:
    z = golden("vae")["f5.latent"]
    assert torch.equal(vae.decode(z, Tiling(tile=(8, 8), stride=(8, 8))), vae.decode(z))


def test_a_frame_does_not_see_the_future(vae: WanVAE) -> None:
    torch.manual_seed(0)
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    changed = clip.clone()
    changed[:, :, 5:] *= -1
    assert torch.equal(vae.encode(clip)[:, :, :2], vae.encode(changed)[:, :, :2])
    assert not torch.equal(vae.encode(clip)[:, :, 2:], vae.encode(changed)[:, :, 2:])


def test_batch_items_are_independent(vae: WanVAE) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 16, 3, 2, 4)
    both = vae.decode(z)
    for i in range(2):
        assert relative_error(both[i : i + 1], vae.decode(z[i : i + 1])) < 1e-5


def test_whole_clip_training_path_equals_streaming_and_has_gradients(vae: WanVAE) -> None:
    torch.manual_seed(0)
    clip = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    mu, logvar = vae.encode_moments(clip)
    mean, std = (torch.tensor(s).view(1, -1, 1, 1, 1) for s in (SMALL.latents_mean, SMALL.latents_std))
    assert logvar.shape == mu.shape == (1, 16, 3, 2, 2)
    assert relative_error((mu - mean) / std, vae.encode(clip)) < 1e-5
    decoded = vae.decode_whole(mu)
    assert relative_error(decoded.clamp(-1, 1), vae.decode((mu - mean) / std)) < 1e-5
    grads = torch.autograd.grad(decoded.square().mean(), list(vae.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_dtype_follows_the_caller_and_output_is_clamped(vae: WanVAE) -> None:
    loud = copy.deepcopy(vae)
    torch.nn.init.constant_(loud.decoder.head[2].bias, 3.0)
    out = loud.decode(torch.randn(1, 16, 1, 2, 2, dtype=torch.float64))
    assert out.dtype == torch.float64 and out.max() == 1
    assert vae.encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("tiling", [None, Tiling(tile=(3, 3), stride=(2, 2))])
def test_half_precision_stays_near_float32(vae: WanVAE, tiling: Tiling | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights, what a GPU runs: within a few of its roundings, whole, tiled and streamed; flat input stays finite."""
    monkeypatch.setattr(vae_module, "_CHUNK_LATENT_PIXELS", 16)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    z = vae.encode(clip, tiling)
    assert relative_error(half.encode(clip, tiling), z) < 0.03
    assert relative_error(half.decode(z, tiling), vae.decode(z, tiling)) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        norm = vae_module.RMSNorm(8).to(dtype)
        assert torch.isfinite(norm(torch.zeros(1, 8, 1, 2, 2, dtype=dtype))).all()
        assert torch.isfinite(norm(torch.full((1, 8, 1, 2, 2), 1e-6, dtype=dtype))).all()


@pytest.mark.parametrize("frames", [0, 2, 4, 6, 80])
def test_frame_counts_other_than_4k_plus_1_are_refused(vae: WanVAE, frames: int) -> None:
    with pytest.raises(ValueError, match=f"got {frames}"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize("shape", [(1, 3, 5, 16, 20), (1, 3, 5, 0, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)])
def test_encode_refuses_other_shapes(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8|takes a video"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 8, 1, 2, 2), (1, 16, 0, 2, 2), (16, 1, 2, 2)])
def test_decode_refuses_other_shapes(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes latents"):
        vae.decode(torch.zeros(shape))
