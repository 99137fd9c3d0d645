"""The VAE against the reference's tensors: streamed in any chunks, tiled, and with gradients."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast import Tiling, VAEConfig, WanVAE
from pusa_fast.kernels import reference
from pusa_fast.model.vae import stream as vae_stream
from pusa_fast.model.vae.layers import Head, RMSNorm
from pusa_fast.model.vae.stages import Stage
from pusa_fast.sampling.conditioning import to_frames
from pusa_fast.testing import make_input, relative_error
from pusa_fast.weights import load_vae

GoldenLoader = Callable[[str], dict[str, Tensor]]
SMALL = VAEConfig(base_dim=8, num_res_blocks=1)


@pytest.fixture(scope="module")
def vae(golden: GoldenLoader) -> WanVAE:
    return load_vae(golden("vae_weights"), config=SMALL)


@pytest.mark.parametrize("adds", [True, False], ids=["adds in the convolution", "adds in the norm"])
@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5, None])
@pytest.mark.parametrize("case", ["f1", "f5", "f17"])
def test_streams_like_the_reference_at_any_chunk_length(
    vae: WanVAE, golden: GoldenLoader, case: str, latents: int | None, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if latents is not None:
        monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: latents)
    monkeypatch.setattr(vae, "adds", adds)
    g = golden("vae")
    assert relative_error(vae.encode(g[f"{case}.video"]), g[f"{case}.latent"]) < 1e-5
    assert relative_error(vae.decode(g[f"{case}.latent"]), g[f"{case}.decoded"]) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_stages_may_cut_a_clip_each_in_its_own_way(
    vae: WanVAE, golden: GoldenLoader, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: draw.randint(1, 4))
    g = golden("vae")
    assert relative_error(vae.encode(g["f17.video"]), g["f17.latent"]) < 1e-5
    assert relative_error(vae.decode(g["f17.latent"]), g["f17.decoded"]) < 1e-5


def test_frames_leave_in_pieces_that_stay_as_they_are(
    vae: WanVAE, golden: GoldenLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uint8 frames, truncated or rounded; the input and earlier pieces are not written to."""
    z = golden("vae")["f17.latent"]
    before, video = z.clone(), vae.decode(z)
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: 2)
    for rounded in (False, True):
        pieces = list(vae.decode_frames(z, rounded=rounded))
        assert [p.shape[1] for p in pieces] == [5, 8, 4]
        frames = torch.cat(pieces, dim=1)
        assert frames.dtype == torch.uint8 and frames.shape == (1, 17, 32, 48, 3)
        wanted = to_frames(video, "exact" if rounded else "reference")
        assert (frames[0].int() - wanted.int()).abs().max() <= 1
        assert (frames[0] == wanted).float().mean() > 0.999
    assert torch.equal(z, before)


def test_a_piece_is_computed_when_it_is_asked_for(
    vae: WanVAE, golden: GoldenLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: 1)
    done: list[int] = []
    head = vae_stream._LAYERS[Head]
    monkeypatch.setitem(vae_stream._LAYERS, Head, lambda *given: done.append(1) or head(*given))
    pieces = vae.decode_frames(golden("vae")["f17.latent"])
    next(pieces)
    next(pieces)
    assert len(done) == 2


def test_callers_modes_do_not_matter(vae: WanVAE, golden: GoldenLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and with pieces that are asked for inside and outside of inference mode."""
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: 1)
    g = golden("vae")
    whole = torch.cat(list(vae.decode_frames(g["f17.latent"])), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(g["f17.video"]), vae.encode(g["f17.video"]))
        assert relative_error(vae.encode(g["f17.video"]), g["f17.latent"]) < 1e-5
        assert relative_error(vae.decode(g["f17.latent"]), g["f17.decoded"]) < 1e-5
    with torch.inference_mode():
        pieces = vae.decode_frames(g["f17.latent"])
        first = next(pieces)
    assert torch.equal(torch.cat([first, *pieces], dim=1), whole)
    assert torch.is_grad_enabled()


def test_encoding_leaves_the_video_as_it_was(vae: WanVAE) -> None:
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    before = video.clone()
    vae.encode(video)
    assert torch.equal(video, before)


def test_upsampling_phases_are_the_doubling_and_its_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 5, 7, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    wanted = nnf.conv2d(nnf.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, padding=1)
    y = nnf.conv2d(x, vae_stream.upsampling_phases(weight), padding=1).permute(0, 2, 3, 1)[None]
    r, _ = reference.vae_act(y, upsampled=True)
    torch.testing.assert_close(r[0].permute(0, 3, 1, 2), wanted)


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


@pytest.mark.parametrize("latents", [1, 4])
@pytest.mark.parametrize(
    "tiling",
    [None, Tiling(tile=(3, 3), mode="exact"), Tiling(tile=(3, 3), stride=(2, 2))],
    ids=lambda t: "whole" if t is None else t.mode,
)
def test_batch_items_are_independent(
    vae: WanVAE, tiling: Tiling | None, latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: latents)
    torch.manual_seed(0)
    z, video = torch.randn(2, 16, 3, 4, 5), torch.rand(2, 3, 9, 32, 40) * 2 - 1
    pixels, means = vae.decode(z, tiling), vae.encode(video, tiling)
    for i in range(2):
        assert relative_error(pixels[i : i + 1], vae.decode(z[i : i + 1], tiling)) < 1e-5
        assert relative_error(means[i : i + 1], vae.encode(video[i : i + 1], tiling)) < 1e-5


@pytest.mark.parametrize("mode", ["feather", "exact"])
def test_frames_of_tiles_are_truncated_or_rounded(vae: WanVAE, mode: str) -> None:
    z, tiling = make_input(1, 16, 2, 5, 6), Tiling(tile=(4, 4), stride=(2, 2), mode=mode)
    video = vae.decode(z, tiling)
    for rounded in (False, True):
        (frames,) = vae.decode_frames(z, tiling, rounded)
        wanted = to_frames(video, "exact" if rounded else "reference")
        assert (frames[0].int() - wanted.int()).abs().max() <= 1
        assert (frames[0] == wanted).float().mean() > 0.99


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


@pytest.mark.parametrize("tiling", [None, Tiling(tile=(3, 3), stride=(2, 2)), Tiling(tile=(3, 3), mode="exact")])
def test_half_precision_stays_near_float32(vae: WanVAE, tiling: Tiling | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights, what a GPU runs: within a few of its roundings; flat input stays finite."""
    monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: 1)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    z = vae.encode(clip, tiling)
    assert relative_error(half.encode(clip, tiling), z) < 0.03
    assert relative_error(half.decode(z, tiling), vae.decode(z, tiling)) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        norm = RMSNorm(8).to(dtype)
        assert torch.isfinite(norm(torch.zeros(1, 8, 1, 2, 2, dtype=dtype))).all()
        assert torch.isfinite(norm(torch.full((1, 8, 1, 2, 2), 1e-6, dtype=dtype))).all()


@pytest.mark.parametrize("frames", [0, 2, 4, 6, 80])
def test_frame_counts_other_than_4k_plus_1_are_refused(vae: WanVAE, frames: int) -> None:
    with pytest.raises(ValueError, match=f"got {frames}"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 16, 20), (1, 3, 5, 0, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16), (0, 3, 5, 16, 16)]
)
def test_encode_refuses_other_shapes(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8|takes a video"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 8, 1, 2, 2), (1, 16, 0, 2, 2), (16, 1, 2, 2)])
def test_decode_refuses_other_shapes(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="takes latents"):
        vae.decode(torch.zeros(shape))
