"""Where tiles are, and how feathered ones are run: for any size, tile and stride."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast.model.vae.blending import blend
from pusa_fast.model.vae.tiling import Tiling, tile_spans
from pusa_fast.ops.tiles import Tile, blend_box_, feather_mask

CPU = torch.device("cpu")


def axes(length: int, tile: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """A length, a tile and a stride that is not larger."""
    sizes = st.tuples(st.integers(1, length), st.integers(1, tile))
    return sizes.flatmap(lambda given: st.tuples(st.just(given[0]), st.just(given[1]), st.integers(1, given[1])))


def blended(x: Tensor, tiling: Tiling, batch: int = 1) -> Tensor:
    """x [T, H, W, C] cut into tiles and blended again."""
    out = torch.full_like(x, torch.nan)
    blend(x, lambda tiles: tiles.contiguous(), out, tiling, 1, 1, batch)
    return out


@given(axes(70, 30))
def test_spans_cover_the_axis_and_stay_inside(sizes: tuple[int, int, int]) -> None:
    length, tile, _ = sizes
    spans = tile_spans(*sizes)
    assert {p for a, b in spans for p in range(a, b)} == set(range(length))
    assert all(0 <= a < b <= length and b - a <= tile for a, b in spans)
    assert all(b > spans[i][1] for i, (_, b) in enumerate(spans[1:])), "a tile is wholly inside its predecessor"


def test_spans_of_the_reference() -> None:
    assert tile_spans(60, 30, 15) == [(0, 30), (15, 45), (30, 60)]  # 480p: three tiles down
    assert tile_spans(104, 52, 26) == [(0, 52), (26, 78), (52, 104)]


@given(axes(70, 30))
def test_normalised_weights_sum_to_one(sizes: tuple[int, int, int]) -> None:
    length, tile, stride = sizes
    masks = torch.zeros(0, length)
    for a, b in tile_spans(length, tile, stride):
        mask = torch.zeros(1, length)
        mask[0, a:b] = feather_mask((a, b), length, tile - stride, CPU)
        assert mask[0, a:b].min() > 0 and mask.max() <= 1
        masks = torch.cat([masks, mask])
    torch.testing.assert_close((masks / masks.sum(0)).sum(0), torch.ones(length))


@settings(max_examples=60)
@given(axes(19, 9), axes(19, 9), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 3))
def test_blending_an_identity_gives_the_picture_back(
    rows: tuple[int, int, int], columns: tuple[int, int, int], dtype: torch.dtype, batch: int
) -> None:
    """Every pixel is written, from tiles whose weights sum to one."""
    x = torch.randn(2, rows[0], columns[0], 3, dtype=dtype)
    torch.testing.assert_close(blended(x, Tiling((rows[1], columns[1]), (rows[2], columns[2])), batch), x)


@settings(max_examples=40)
@given(axes(19, 9), axes(19, 9), st.integers(1, 4))
def test_cells_have_the_bits_of_the_whole_plan_at_once(
    rows: tuple[int, int, int], columns: tuple[int, int, int], batch: int
) -> None:
    """Unrelated tiles, grown threefold: no tile is dropped too early, or added twice."""
    tiling = Tiling((rows[1], columns[1]), (rows[2], columns[2]))
    places = [(top, left) for top, _ in tile_spans(*rows) for left, _ in tile_spans(*columns)]
    assume(len(places) <= 64)  # more go to plain torch when they come at once: the same within rounding
    spans = {(t, l): (b - t, r - l) for t, b in tile_spans(*rows) for l, r in tile_spans(*columns)}
    tiles = [Tile(torch.randn(1, *(3 * n for n in spans[place]), 2), *(3 * n for n in place)) for place in places]
    left_to_come = list(tiles)

    def run(given: Tensor) -> Tensor:
        found = [left_to_come.pop(0).values for _ in given]
        assert all(
            tuple(g.shape[1:3]) == (f.shape[1] * 2 // 3, f.shape[2] * 2 // 3) for g, f in zip(given, found, strict=True)
        )
        return torch.stack(found)

    picture = (3 * rows[0], 3 * columns[0])
    out, expected = torch.empty(1, *picture, 2), torch.empty(1, *picture, 2)
    blend(torch.zeros(4, 2 * rows[0], 2 * columns[0], 5), run, out, tiling, 2, 3, batch)
    borders = (3 * (rows[1] - rows[2]), 3 * (columns[1] - columns[2]))
    blend_box_(expected, tiles, picture=picture, borders=borders)
    assert not left_to_come and torch.equal(out, expected)


def test_tiles_come_in_groups_as_views() -> None:
    """At most `batch` of one size and row together; each is its area of the source, not copied."""
    x, tiling, seen = torch.rand(2, 14, 22, 4), Tiling((4, 5), (2, 3)), []

    def run(tiles: Tensor) -> Tensor:
        assert tiles.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        seen.append(tiles)
        return tiles[:, :1, ::2, ::2, :3].contiguous()

    blend(x, run, torch.empty(1, 7, 11, 3), tiling, 2, 1, batch=2)
    areas = [x[:, 2 * t : 2 * b, 2 * l : 2 * r] for t, b in tile_spans(7, 4, 2) for l, r in tile_spans(11, 5, 3)]
    assert max(len(tiles) for tiles in seen) == 2
    for tile, area in zip((tile for tiles in seen for tile in tiles), areas, strict=True):
        assert torch.equal(tile, area)


def test_tiles_are_dropped_when_no_cell_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 x 6 tiles that overlap by half, one row and two more are held at most."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []

    def run(tiles: Tensor) -> Tensor:
        most.append(len(alive))
        result = tiles.contiguous()
        alive.add(result)
        return result

    blend(torch.rand(1, 14, 14, 1), run, torch.empty(1, 14, 14, 1), Tiling((4, 4), (2, 2)), 1, 1)
    assert len(most) == 36 and max(most) <= 8


def test_tiles_of_another_size_are_refused() -> None:
    x = torch.zeros(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"a tile of 4x4 came back as \[2, 3, 4, 3\]"):
        blend(x, lambda tiles: tiles[:, :, 1:], torch.empty_like(x), Tiling(), 1, 1)
    with pytest.raises(ValueError, match=r"tiles must be \[2, h, w, 3\]"):
        blend(x, lambda tiles: tiles[:, :1], torch.empty_like(x), Tiling(), 1, 1)


def test_boxes_are_adjacent_and_scaled() -> None:
    boxes = Tiling((2, 3), mode="exact").boxes((3, 4), 8)
    assert boxes == [((0, 16), (0, 24)), ((0, 16), (24, 32)), ((16, 24), (0, 24)), ((16, 24), (24, 32))]


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
