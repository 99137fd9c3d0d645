"""Exact tiles: that they are the whole picture, how far a stage sees, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast import Tiling, VAEConfig, WanVAE
from pusa_fast.model.vae.stages import Stage, full, overcompute, trace
from pusa_fast.testing import assert_within_budget, make_input
from pusa_fast.weights import load_vae

GoldenLoader = Callable[[str], dict[str, Tensor]]
SMALL = VAEConfig(base_dim=8, num_res_blocks=1)


@pytest.fixture(scope="module")
def vae(golden: GoldenLoader) -> WanVAE:
    return load_vae(golden("vae_weights"), config=SMALL)


@pytest.fixture(scope="module")
def exact(vae: WanVAE) -> WanVAE:
    return load_vae({name: value.double() for name, value in vae.state_dict().items()}, config=SMALL)


@pytest.mark.parametrize("tile", [(3, 4), (2, 7), (16, 5), (1, 1)])
@pytest.mark.parametrize("latents", [1, None])
def test_tiled_is_whole_on_sizes_that_do_not_divide(
    vae: WanVAE, exact: WanVAE, tile: tuple[int, int], latents: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if latents:
        monkeypatch.setattr(Stage, "latents_per_piece", lambda *_: latents)
    tiling = Tiling(tile=tile, mode="exact")
    z = make_input(1, 16, 3, 7, 11)
    video = make_input(1, 3, 5, 40, 72, seed=1).clamp(-1, 1)
    assert_within_budget(vae.decode(z, tiling), vae.decode(z), exact.decode(z.double()))
    assert_within_budget(vae.encode(video, tiling), vae.encode(video), exact.encode(video.double()))


def test_a_batch_in_tiles(vae: WanVAE) -> None:
    z = make_input(2, 16, 2, 5, 6)
    tiling = Tiling(tile=(2, 4), mode="exact")
    for i in range(2):
        torch.testing.assert_close(
            vae.decode(z, tiling)[i : i + 1], vae.decode(z[i : i + 1], tiling), rtol=1e-4, atol=1e-5
        )


def test_uint8_frames_of_tiles(vae: WanVAE) -> None:
    z = make_input(1, 16, 2, 5, 6)
    whole = torch.cat(list(vae.decode_frames(z)), dim=1)
    (tiled,) = vae.decode_frames(z, Tiling(tile=(2, 4), mode="exact"))
    assert tiled.shape == whole.shape == (1, 5, 40, 48, 3) and tiled.dtype == torch.uint8
    assert (tiled.int() - whole.int()).abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["encode", "decode"]))
def test_boxes_cover_and_sources_stay_inside(length: int, tile: int, kind: str) -> None:
    runner = _META.runner(kind)
    scale = runner.outer[-1].scale[1]
    covered: list[int] = []
    for rows, columns in Tiling(tile=(tile, 3), mode="exact").boxes((length, 3), scale):
        covered += range(*rows)
        route = trace(runner.outer, (rows, columns), (length, 3))
        for stage, source, crop in zip(runner.outer, route.sources, route.crops, strict=True):
            size = length * stage.scale[0]
            assert 0 <= source[0][0] < source[0][1] <= size
            made = stage.result(source[0])
            assert 0 <= crop[0][0] < crop[0][1] <= made[1] - made[0]
            if scale < stage.scale[0]:
                assert source[0][0] % 2 == 0, "an odd start would pair other rows"
    assert covered == list(range(length * scale))


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_halos_are_as_wide_as_needed_and_not_much_wider(vae: WanVAE, kind: str) -> None:
    """A pixel beyond a traced source changes nothing; some pixel of its outermost rows does."""
    runner = vae.runner(kind)
    latents = 24
    size = (latents, 1)
    scale = runner.outer[-1].scale[1]
    box = ((10 * scale, 12 * scale), (0, scale))
    first = runner.outer[0]
    (start, stop), _ = trace(runner.outer, box, size).sources[0]
    torch.manual_seed(0)
    channels = 3 if kind == "encode" else first.layers[0].resample[1].in_channels  # type: ignore[union-attr, union-attr]
    x = torch.randn(1, 1, latents * first.scale[0], first.scale[0], channels)

    def result(x: Tensor) -> Tensor:
        from pusa_fast.model.vae.modes import Clip

        with torch.no_grad():
            (piece,) = runner.run(runner.outer, x.clone(), Clip(1, size))
        return piece[:, :, slice(*box[0])].clone()

    before = result(x)
    outside = x.clone()
    outside[:, :, :start] += 1
    outside[:, :, stop:] += 1
    assert torch.equal(result(outside), before)
    # A stage's span is rounded to whole input pixels at each change of resolution: at most two rows
    # a stage are not needed.
    slack = 2 * len(runner.outer) * first.scale[0] // min(s.scale[0] for s in runner.outer)
    for rows in (slice(start, start + slack), slice(stop - slack, stop)):
        inside = x.clone()
        inside[:, :, rows] += 1
        assert not torch.equal(result(inside), before)


def test_overcompute(vae: WanVAE) -> None:
    runner = vae.runner("decode")
    boxes = Tiling(tile=(12, 10), mode="exact").boxes((12, 10), 8)
    assert overcompute(runner.outer, boxes, (12, 10), runner.inner) == 1
    costs = [
        overcompute(runner.outer, Tiling(tile=(t, t), mode="exact").boxes((12, 10), 8), (12, 10), runner.inner)
        for t in (8, 4, 2)
    ]
    assert 1 < costs[0] < costs[1] < costs[2]


def test_overcompute_at_480p_is_a_fraction_of_the_feathered_one() -> None:
    """The feathered figures are the specification's (docs/reference.md, 6.2)."""
    runner = _META.runner("decode")
    for size, feathered in (((60, 104), 2.25), ((90, 160), 3.02)):
        assert runner.overcompute(size, Tiling()) == pytest.approx(feathered, abs=0.005)
        assert 1 < runner.overcompute(size, Tiling(mode="exact")) < 1.25
        assert runner.overcompute(size, None) == 1


def test_stages_of_the_published_vae() -> None:
    encode, decode = _META.runner("encode"), _META.runner("decode")
    assert [(s.rate, s.scale, s.channels) for s in decode.stages] == [
        ((1, 1), (1, 1), 384), ((1, 2), (1, 2), 384), ((2, 4), (2, 4), 192), ((4, 4), (4, 8), 96),
    ]  # fmt: skip
    assert [(s.rate, s.scale, s.channels) for s in encode.stages] == [
        ((4, 4), (8, 4), 96), ((4, 2), (4, 2), 192), ((2, 1), (2, 1), 384), ((1, 1), (1, 1), 384),
    ]  # fmt: skip
    assert full(3, 4) == ((0, 3), (0, 4))
    # 480p in bf16: one latent frame of the last stage is 4 frames of 480x832x96, of the first
    # 60x104x384.
    sizes = [
        stage.latents_per_piece(full(60 * s, 104 * s), 2, 4 * 480 * 832 * 96 * 2)
        for stage, s in zip(decode.stages, (1, 1, 2, 4), strict=True)
    ]
    assert sizes == [64, 8, 2, 1]
    assert decode.stages[-1].latents_per_piece(full(240, 416), 2, 1) == 1
    assert [s.halo for s in decode.stages[1:]] == [6, 6, 7]


with torch.device("meta"):
    _META = WanVAE()
