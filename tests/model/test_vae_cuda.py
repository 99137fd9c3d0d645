"""The VAE and its tiling on a GPU: against the same on the CPU, by every backend that is there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from pusa_fast import Tiling, VAEConfig, WanVAE, ops
from pusa_fast.model.vae.memory import peak_bytes
from pusa_fast.native import tiles as native_tiles
from pusa_fast.ops.tiles import Tile, blend_box_
from pusa_fast.testing import assert_within_budget, make_input, relative_error

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(VAEConfig(base_dim=16)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def on_gpu(vae: WanVAE) -> WanVAE:
    twin = WanVAE(vae.config).eval().requires_grad_(False)
    twin.load_state_dict(vae.state_dict())
    return twin.to(CUDA)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = native_tiles.cuda_reason(torch.cuda.current_device())
    if request.param == "native" and reason is not None:
        pytest.skip(reason)
    with nullcontext() if request.param == "native" else ops.use("reference"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tiling",
    [None, Tiling(tile=(3, 4), mode="exact"), Tiling(tile=(4, 4), stride=(2, 3))],
    ids=lambda t: "whole" if t is None else t.mode,
)
def test_gpu_is_cpu(
    vae: WanVAE, on_gpu: WanVAE, dtype: torch.dtype, tiling: Tiling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = copy.deepcopy(on_gpu).to(dtype)
    z, video = make_input(1, 16, 3, 7, 10), make_input(1, 3, 9, 56, 80).clamp(-1, 1)
    bound = 5 * torch.finfo(dtype).eps ** 0.75 if dtype != torch.float32 else 1e-4
    assert relative_error(model.decode(z.to(CUDA, dtype), tiling).float().cpu(), vae.decode(z, tiling)) < bound
    assert relative_error(model.encode(video.to(CUDA, dtype), tiling).float().cpu(), vae.encode(video, tiling)) < bound


def test_frames_are_those_of_the_cpu(vae: WanVAE, on_gpu: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    z = make_input(1, 16, 3, 7, 10)
    found, wanted = (torch.cat([p.cpu() for p in m.decode_frames(z)], dim=1) for m in (on_gpu, vae))
    assert (found.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_on_the_gpu(backend: str, dtype: torch.dtype) -> None:
    source = make_input(5, 24, 31, 3, dtype=dtype)
    tiles = [Tile(source[:, t : t + 16, l : l + 16], t, l) for t in (0, 8) for l in (0, 15)]
    on_gpu = [Tile(tile.values.to(CUDA), tile.top, tile.left) for tile in tiles]
    exact = torch.empty(5, 24, 31, 3, dtype=torch.float64)
    blend_box_(exact, [Tile(tile.values.double(), tile.top, tile.left) for tile in tiles], borders=(8, 1))
    for out_dtype in (torch.float32, torch.uint8):
        for rounded in (False, True):
            found, plain = (torch.empty(5, 24, 31, 3, dtype=out_dtype, device=where) for where in (CUDA, "cpu"))
            blend_box_(found, on_gpu, borders=(8, 1), rounded=rounded)
            with ops.use("reference"):
                blend_box_(plain, tiles, borders=(8, 1), rounded=rounded)
            if out_dtype == torch.uint8:
                assert (found.cpu().int() - plain.int()).abs().max() <= 1
            else:
                assert_within_budget(found.cpu(), plain, exact)


def test_a_stream_of_its_own(backend: str) -> None:
    """What is queued on the caller's stream is seen by it, in order."""
    values, found = make_input(4, 64, 64, 3), torch.empty(4, 64, 64, 3, dtype=torch.uint8, device=CUDA)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        blend_box_(found, [Tile(values.to(CUDA, non_blocking=True) * 0.5)])
    stream.synchronize()
    wanted = ((values * 0.5 + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (found.cpu().int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("tiling", [None, Tiling(tile=(15, 26), mode="exact")], ids=["whole", "exact"])
def test_the_predicted_peak_holds(tiling: Tiling | None) -> None:
    """At the published size; libraries' workspaces come on top of what the model counts."""
    with CUDA:
        vae = WanVAE().eval().requires_grad_(False).to(torch.bfloat16)
    z = torch.randn(1, 16, 5, 30, 52, device=CUDA, dtype=torch.bfloat16)
    vae.decode(z, tiling)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vae.decode(z, tiling)
    taken = torch.cuda.max_memory_allocated() - before
    predicted = peak_bytes(vae, "decode", tuple(z.shape), tiling)
    assert 0.7 * taken < predicted < 1.15 * taken
