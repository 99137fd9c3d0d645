"""The tile plan, the feathered masks, and blending, for any size, tile and stride, by every backend of this machine."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast.model.vae import blending
from pusa_fast.model.vae.blending import BACKENDS, Blend, blend, feather_mask, finish_frames, gather_tiles
from pusa_fast.model.vae.tiling import Tiling, tile_spans
from pusa_fast.testing import assert_within_budget

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Length, and a tile with a stride that is not larger.
axis = st.tuples(st.integers(1, 70), st.integers(1, 30)).flatmap(
    lambda sizes: st.tuples(st.just(sizes[0]), st.just(sizes[1]), st.integers(1, sizes[1]))
)
small_axis = st.tuples(st.integers(1, 19), st.integers(1, 9)).flatmap(
    lambda sizes: st.tuples(st.just(sizes[0]), st.just(sizes[1]), st.integers(1, sizes[1]))
)


def backends(dtype: torch.dtype) -> list[str]:
    return [name for name, backend in BACKENDS.items() if backend.serves(CPU, dtype)]


def identity(tiles: Tensor) -> Tensor:
    return tiles


def tiled(x: Tensor, rows: tuple[int, int, int], columns: tuple[int, int, int], backend: str | None) -> Blend:
    """x [T, H, W, C] cut and blended again, tile by tile."""
    found = Blend(*x.shape, (rows[1] - rows[2], columns[1] - columns[2]), CPU, x.dtype, backend)
    for top, bottom in tile_spans(*rows):
        for left, right in tile_spans(*columns):
            found.add(gather_tiles(x, (bottom - top, right - left), [top], [left], backend), [top], [left])
    return found


def oracle(tiles: list[tuple[Tensor, int, int]], shape: tuple[int, ...], borders: tuple[int, int]) -> Tensor:
    """The blend in float64, from the definition."""
    sums, weights = torch.zeros(shape, dtype=torch.float64), torch.zeros(*shape[1:3], 1, dtype=torch.float64)
    for tile, top, left in tiles:
        bottom, right = top + tile.shape[1], left + tile.shape[2]
        rows = feather_mask((top, bottom), shape[1], borders[0], CPU).double()
        columns = feather_mask((left, right), shape[2], borders[1], CPU).double()
        mask = torch.minimum(rows[:, None], columns)[..., None]
        sums[:, top:bottom, left:right] += tile.double() * mask
        weights[top:bottom, left:right] += mask
    return sums / weights


@given(axis)
def test_spans_cover_the_axis_and_stay_inside(sizes: tuple[int, int, int]) -> None:
    length, tile, stride = sizes
    spans = tile_spans(length, tile, stride)
    covered = {p for a, b in spans for p in range(a, b)}
    assert covered == set(range(length))
    assert all(0 <= a < b <= length and b - a <= tile for a, b in spans)
    assert all(b > spans[i][1] for i, (_, b) in enumerate(spans[1:])), "a tile lies wholly inside its predecessor"


@given(axis, axis)
def test_native_plan_is_the_spans(rows: tuple[int, int, int], columns: tuple[int, int, int]) -> None:
    native = pytest.importorskip("pusa_fast._native")
    plan = [(*row, *column) for row in tile_spans(*rows) for column in tile_spans(*columns)]
    assert native.tile_plan(rows[0], columns[0], rows[1], columns[1], rows[2], columns[2]) == plan


@given(axis)
def test_normalised_weights_sum_to_one(sizes: tuple[int, int, int]) -> None:
    length, tile, stride = sizes
    masks = torch.zeros(0, length)
    for a, b in tile_spans(length, tile, stride):
        mask = torch.zeros(1, length)
        mask[0, a:b] = feather_mask((a, b), length, tile - stride, CPU)
        assert mask[0, a:b].min() > 0 and mask.max() <= 1
        masks = torch.cat([masks, mask])
    torch.testing.assert_close((masks / masks.sum(0)).sum(0), torch.ones(length))


@settings(max_examples=40)
@given(small_axis, small_axis, st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 5))
def test_blending_an_identity_gives_the_picture_back(
    rows: tuple[int, int, int], columns: tuple[int, int, int], dtype: torch.dtype, frames: int, channels: int
) -> None:
    """Weights that sum to one, pixel by pixel, for every backend; so with batches too."""
    x = torch.randn(frames, rows[0], columns[0], channels).to(dtype)
    tiling = Tiling((rows[1], columns[1]), (rows[2], columns[2]))
    wide = torch.promote_types(dtype, torch.float32)
    for backend in backends(dtype):
        torch.testing.assert_close(tiled(x, rows, columns, backend).values(False), x.to(wide), msg=backend)
    for batch in (1, 3):
        (found,) = blend(x[None], identity, frames, tiling, 1, 1, channels, batch)
        torch.testing.assert_close(found.values(False), x.to(wide))


@settings(max_examples=40)
@given(small_axis, small_axis, st.sampled_from(DTYPES), st.integers(0, 3), st.booleans())
def test_backends_agree(
    rows: tuple[int, int, int], columns: tuple[int, int, int], dtype: torch.dtype, wider: int, round: bool
) -> None:
    """On tiles that have nothing to do with each other, some reaching beyond -1 .. 1: within budget, and one level of 255."""
    shape, borders = (2, rows[0], columns[0], 3), (rows[1] - rows[2] + wider, columns[1] - columns[2] + wider)
    tiles = [
        (torch.randn(2, bottom - top, right - left, 3).to(dtype), top, left)
        for top, bottom in tile_spans(*rows)
        for left, right in tile_spans(*columns)
    ]
    found = {name: Blend(*shape, borders, CPU, dtype, name) for name in backends(dtype)}
    for result in found.values():
        for tile, top, left in tiles:
            result.add(tile[None], [top], [left])
    expected, plain = oracle(tiles, shape, borders), found["torch"]
    for name, result in found.items():
        assert_within_budget(result.values(False), plain.values(False), expected, name)
        assert torch.equal(result.values(True), result.values(False).clamp(-1, 1))
        levels = result.frames(round)
        assert levels.dtype == torch.uint8 and levels.shape == shape
        assert (levels.int() - plain.frames(round).int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("round", [False, True])
def test_frames_of_whole_clips_are_those_of_the_reference(dtype: torch.dtype, round: bool) -> None:
    """Bit for bit the formula of sampling.conditioning.to_frames, at every level, its halves and beyond the ends."""
    levels = torch.linspace(-3, 258, 1045, dtype=torch.float64)
    values = (levels / 127.5 - 1).to(dtype)[: 1045 // 15 * 15].view(1, 23, 15, 3)
    wide = torch.promote_types(dtype, torch.float32)
    expected = ((values.to(wide) + 1) * 127.5).clip(0, 255)
    expected = (expected.round() if round else expected).to(torch.uint8)
    for name in backends(dtype):
        assert torch.equal(finish_frames(values, round, backend=name), expected), name
        room = torch.full((3, 25, 20, 4), 7, dtype=torch.uint8)
        out = room[1:2, 1:24, 2:17, :3]
        assert finish_frames(values, round, out, name) is out and torch.equal(out, expected), name
        out.fill_(7)
        assert room.eq(7).all(), f"{name}: wrote beside its output"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_has_a_level(dtype: torch.dtype) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=dtype).repeat(9).view(1, 3, 4, 3)
    for name in backends(dtype):
        for round in (False, True):
            levels = finish_frames(values, round, backend=name)
            assert levels.flatten()[:4].tolist() == [0, 255, 0, 128 if round else 127], name
        blended = Blend(1, 3, 4, 3, (0, 0), CPU, dtype, name)
        blended.add(values[None], [0], [0])
        assert blended.values(True).flatten()[1:4].tolist() == [1, -1, 0] and blended.values(True).flatten()[0].isnan()
        assert blended.frames(False).flatten()[:4].tolist() == [0, 255, 0, 127]


def test_driver_scales_and_groups() -> None:
    """Tiles grow by out_scale / in_scale, and at most `batch` of one size come together; items stay apart."""
    x = torch.rand(2, 2, 14, 22, 4)
    tiling, seen = Tiling((4, 5), (2, 3)), []

    def run(tiles: Tensor) -> Tensor:
        assert tiles.is_contiguous()
        seen.append(tiles.shape[0])
        return tiles[:, :1, ::2, ::2, :3].repeat_interleave(3, 2).repeat_interleave(3, 3)

    clips = blend(x, run, 1, tiling, 2, 3, 3, batch=2)
    expected = x[:, :1, ::2, ::2, :3].repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(torch.stack([clip.values(False) for clip in clips]), expected)
    assert sum(seen) == 2 * len(tile_spans(7, 4, 2)) * len(tile_spans(11, 5, 3)) and max(seen) == 2


def test_a_picture_of_one_tile_is_not_copied() -> None:
    x = torch.rand(1, 2, 5, 6, 3)
    (found,) = blend(x, lambda tiles: tiles.mul_(2), 2, Tiling((9, 9), (4, 4)), 1, 1, 3)
    assert torch.equal(found.values(False), x[0])


def test_masks_of_the_reference() -> None:
    """Ramps of (i + 1) / border at inner edges only (reference: build_1d_mask)."""
    mask = feather_mask((4, 12), 20, 4, CPU)
    assert mask.tolist() == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert feather_mask((0, 8), 20, 4, CPU).tolist() == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    overlapping = feather_mask((4, 10), 20, 4, CPU)
    assert overlapping.tolist() == [0.25, 0.5, 1, 0.75, 0.5, 0.25], "the right ramp overwrites the left"
    assert tile_spans(60, 30, 15) == [(0, 30), (15, 45), (30, 60)]  # 480p: three tiles down
    assert tile_spans(104, 52, 26) == [(0, 52), (26, 78), (52, 104)]


@pytest.mark.parametrize(
    ("tile", "stride", "mode", "message"),
    [
        ((0, 8), (1, 1), "feather", "Tiling.tile"),
        ((8, 8), (0, 4), "feather", "Tiling.stride"),
        ((8, 8), (9, 4), "feather", "larger than tile"),
        ((8, 8), (4, 4), "blur", "'blur'"),
    ],
)
def test_bad_tilings_are_refused(tile: tuple[int, int], stride: tuple[int, int], mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiling(tile, stride, mode)


@pytest.mark.parametrize("backend", backends(torch.float32))
def test_bad_tiles_are_refused(backend: str) -> None:
    good = torch.zeros(1, 2, 4, 4, 3)
    result = Blend(2, 6, 6, 3, (2, 2), CPU, torch.float32, backend)
    result.add(good, [0], [0])
    bad: list[tuple[Any, ...]] = [
        (good, [0], [0], "twice"),
        (good.repeat(2, 1, 1, 1, 1), [2, 2], [2, 2], "twice"),
        (good, [3], [0], "inside 6x6"),
        (good, [-1], [0], "inside 6x6"),
        (good, [2, 0], [0], "1 tiles need"),
        (good, [2], [0, 1], "a top and a left"),
        (good[0], [2], [0], "must be"),
        (good[:, :1], [2], [0], "must be"),
        (good.half(), [2], [0], "float16"),
    ]
    for tiles, tops, lefts, message in bad:
        with pytest.raises(ValueError, match=message):
            result.add(tiles, tops, lefts)
    with pytest.raises(ValueError, match=r"no tile covers pixel \(0, 4\)"):
        result.frames(False)
    with pytest.raises(ValueError, match="cannot blend"):
        Blend(0, 6, 6, 3, (2, 2), CPU, torch.float32, backend)
    with pytest.raises(ValueError, match="uint8"):
        finish_frames(good[0], False, torch.zeros(2, 4, 4, 3), backend)
    with pytest.raises(ValueError, match="came back"):
        blend(good, lambda tiles: tiles[:, :1], 2, Tiling(), 1, 1, 3)


def test_a_backend_that_does_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'native' does not serve torch.float64.*choose one of torch"):
        blending.chosen(CPU, torch.float64, "native")
    with pytest.raises(ValueError, match="'metal'"):
        blending.chosen(CPU, torch.float32, "metal")


def test_lives_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blending, "_native", None)
    assert backends(torch.float32) == ["torch"]
    x = torch.randn(1, 2, 7, 9, 3)
    (found,) = blend(x, identity, 2, Tiling((4, 4), (3, 2)), 1, 1, 3)
    torch.testing.assert_close(found.values(False), x[0])
    monkeypatch.setattr(importlib, "import_module", lambda name: object())  # older than this source
    assert blending._load_native() is None
