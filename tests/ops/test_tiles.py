"""Boxes made of tiles: masks, blending, levels; compiled and in torch, against float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast import native, ops
from pusa_fast.native import tiles as native_tiles
from pusa_fast.ops.tiles import Tile, blend_box_, feather_mask
from pusa_fast.testing import assert_within_budget

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS: dict[str, Callable[[], Any]] = {"automatic": nullcontext, "torch": partial(ops.use, "reference")}
size = st.tuples(st.integers(1, 19), st.integers(1, 9), st.integers(0, 9))


def made(tiles: list[Tile], shape: tuple[int, ...], dtype: torch.dtype, backend: str, **options: Any) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    with BACKENDS[backend]():
        blend_box_(out, tiles, **options)
    return out


def levels(values: Tensor, backend: str = "automatic", rounded: bool = False) -> Tensor:
    return made([Tile(values)], tuple(values.shape), torch.uint8, backend, rounded=rounded)


def oracle(tiles: list[Tile], picture: tuple[int, int], borders: tuple[int, int]) -> Tensor:
    """The whole picture in float64, from the definition."""
    T, _, _, C = tiles[0].values.shape
    sums, weights = torch.zeros(T, *picture, C, dtype=torch.float64), torch.zeros(*picture, 1, dtype=torch.float64)
    for tile in tiles:
        rows = feather_mask((tile.top, tile.bottom), picture[0], borders[0], CPU).double()
        columns = feather_mask((tile.left, tile.right), picture[1], borders[1], CPU).double()
        mask = torch.minimum(rows[:, None], columns)[..., None]
        sums[:, tile.top : tile.bottom, tile.left : tile.right] += tile.values.double() * mask
        weights[tile.top : tile.bottom, tile.left : tile.right] += mask
    return sums / weights


@st.composite
def scattered(draw: st.DrawFn, dtype: torch.dtype) -> tuple[list[Tile], tuple[int, int], tuple[int, int]]:
    """Tiles anywhere in a picture, the first as large as it; the picture and the borders."""
    rows, columns = draw(size), draw(size)
    picture, borders = (rows[0], columns[0]), (rows[2], columns[2])
    tiles = [Tile(torch.randn(2, *picture, 3).to(dtype))]
    for _ in range(draw(st.integers(0, 5))):
        height, width = draw(st.integers(1, rows[0])), draw(st.integers(1, columns[0]))
        top, left = draw(st.integers(0, rows[0] - height)), draw(st.integers(0, columns[0] - width))
        tiles.append(Tile(torch.randn(2, height, width, 3).to(dtype), top, left))
    return tiles, picture, borders


@settings(max_examples=60)
@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_any_tiles_blend_within_budget(data: st.DataObject, dtype: torch.dtype, rounded: bool) -> None:
    """Unrelated tiles. Every box has the bits of the whole; levels are at most one off."""
    tiles, picture, borders = data.draw(scattered(dtype))
    shape, where = (2, *picture, 3), {"picture": picture, "borders": borders}
    expected, wide = oracle(tiles, picture, borders), torch.promote_types(dtype, torch.float32)
    plain = made(tiles, shape, wide, "torch", **where)
    assert_within_budget(made(tiles, shape, wide, "automatic", **where), plain, expected)
    for backend in BACKENDS:
        whole = made(tiles, shape, wide, backend, **where)
        assert torch.equal(made(tiles, shape, wide, backend, **where, clamp=True), whole.clamp(-1, 1))
        frames = made(tiles, shape, torch.uint8, backend, **where, rounded=rounded)
        assert (frames.int() - levels(plain, "torch", rounded).int()).abs().max() <= 1
        top, left = data.draw(st.integers(0, picture[0] - 1)), data.draw(st.integers(0, picture[1] - 1))
        box = whole[:, top:, left:]
        assert torch.equal(made(tiles, tuple(box.shape), wide, backend, **where, at=(top, left)), box)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_and_places(backend: str, dtype: torch.dtype) -> None:
    """With one tile of any strides: a part of it; it in a larger tensor, whose rest stays."""
    values = torch.randn(5, 9, 11, 4).to(dtype)
    values[0, 0, 0, 0] = -0.0
    for source in (
        values,
        values.permute(3, 1, 2, 0),
        values[::2, :, ::3],
        values[..., :3],
        values[:1].expand(3, 9, 11, 4),
    ):
        T, H, W, C = source.shape
        box = made([Tile(source)], (T, H - 2, W - 1, C), dtype, backend, at=(2, 1), picture=(H, W))
        assert torch.equal(box, source[:, 2:, 1:])
        room = torch.full((T + 2, H + 3, W + 2, C), 7, dtype=dtype)
        with BACKENDS[backend]():
            blend_box_(room[1 : T + 1, 2 : H + 2, 1 : W + 1], [Tile(source)])
        assert torch.equal(room[1 : T + 1, 2 : H + 2, 1 : W + 1], source)
        room[1 : T + 1, 2 : H + 2, 1 : W + 1] = 7
        assert room.eq(7).all(), "wrote outside its output"
    assert made([Tile(values)], values.shape, dtype, backend)[0, 0, 0, 0].signbit()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_levels_are_those_of_the_reference(backend: str, dtype: torch.dtype, rounded: bool) -> None:
    """To the bit sampling.conditioning.to_frames: levels, their halves, beyond the ends."""
    values = (torch.linspace(-3, 258, 1035, dtype=torch.float64) / 127.5 - 1).to(dtype).view(1, 23, 15, 3)
    expected = ((values.to(torch.promote_types(dtype, torch.float32)) + 1) * 127.5).clip(0, 255)
    expected = (expected.round() if rounded else expected).to(torch.uint8)
    assert torch.equal(levels(values, backend, rounded), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_has_a_level(backend: str, dtype: torch.dtype) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=dtype).repeat(9).view(1, 3, 4, 3)
    for rounded in (False, True):
        assert levels(values, backend, rounded).flatten()[:4].tolist() == [0, 255, 0, 128 if rounded else 127]
    clamped = made([Tile(values)], values.shape, dtype, backend, clamp=True).flatten()
    assert clamped[0].isnan() and clamped[1:4].tolist() == [1, -1, 0]
    uncovered = made([Tile(values[:, :2])], values.shape, torch.float32, backend)
    assert uncovered[:, 2].isnan().all() and not uncovered[0, 0, 1, 0].isnan()
    assert made([Tile(values[:, :2])], values.shape, torch.uint8, backend)[:, 2].eq(0).all()


def test_masks_of_the_reference() -> None:
    """Ramps of (i + 1) / border at inner edges only (reference: build_1d_mask)."""
    assert feather_mask((4, 12), 20, 4, CPU).tolist() == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert feather_mask((0, 8), 20, 4, CPU).tolist() == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    overlapping = feather_mask((4, 10), 20, 4, CPU)
    assert overlapping.tolist() == [0.25, 0.5, 1, 0.75, 0.5, 0.25], "the right ramp overwrites the left"


def test_results_on_meta_are_checked_and_nothing_else() -> None:
    out = torch.empty(2, 4, 4, 3, device="meta")
    blend_box_(out, [Tile(torch.empty(2, 4, 4, 3, device="meta"))])
    with pytest.raises(ValueError, match="must be inside 4x4"):
        blend_box_(out, [Tile(torch.empty(2, 4, 4, 3, device="meta"), 1)])


GOOD = torch.zeros(2, 4, 4, 3)
ROOM = torch.zeros(4, 4, 4, 3)


@pytest.mark.parametrize(
    ("out", "tiles", "options", "message"),
    [
        (GOOD[0], [GOOD], {}, r"out must be \[T, H, W, C\]"),
        (GOOD, [], {}, "at least one tile"),
        (GOOD, [GOOD[0]], {}, r"tiles must be \[2, h, w, 3\]"),
        (GOOD, [GOOD[:1]], {}, r"tiles must be \[2, h, w, 3\]"),
        (GOOD, [GOOD[..., :2]], {}, r"tiles must be \[2, h, w, 3\]"),
        (GOOD, [GOOD.int()], {}, "float dtype, got torch.int32"),
        (GOOD, [GOOD, GOOD.half()], {}, "must be torch.float32 on cpu, got torch.float16"),
        (GOOD, [GOOD.to("meta")], {}, "got torch.float32 on meta"),
        (GOOD, [Tile(GOOD[:, :2], 3, 0)], {}, r"a tile of 2x4 at \(3, 0\) must be inside 4x4"),
        (GOOD, [Tile(GOOD[:, :2], 0, -1)], {}, "must be inside"),
        (GOOD, [GOOD], {"at": (0, 1)}, r"the box of 4x4 at \(0, 1\) must be inside 4x4"),
        (GOOD, [GOOD], {"borders": (0, -1)}, "borders must be 0 or more"),
        (ROOM[:2], [ROOM[1:3]], {}, "the same memory"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(out: Tensor, tiles: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend_box_(
            out if out is not GOOD else torch.empty_like(GOOD),
            [tile if isinstance(tile, Tile) else Tile(tile) for tile in tiles],
            **options,
        )


def test_more_tiles_than_the_compiled_code_takes() -> None:
    tiles = [Tile(torch.full((1, 1, 1, 1), float(i))) for i in range(native_tiles._MOST_TILES + 1)]
    out = torch.empty(1, 1, 1, 1)
    assert not native_tiles.supports(out, tiles)
    blend_box_(out, tiles)
    assert out.item() == native_tiles._MOST_TILES / 2


def test_lives_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 3, 4, 3)
    for compiled in (None, object()):  # missing, older than this source
        monkeypatch.setattr(native, "compiled", compiled)
        assert not native_tiles.supports(values, [(values, 0, 0)])
        assert torch.equal(made([Tile(values)], (2, 3, 4, 3), torch.float32, "automatic"), values)
