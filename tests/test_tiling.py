"""The tile plan and the feathered masks, for any size, tile and stride."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pusa_fast.model.tiling import Tiling, blend_tiles, feather_mask, tile_spans

axis = st.tuples(st.integers(1, 70), st.integers(1, 30), st.integers(1, 30))


@given(axis)
def test_spans_cover_the_axis_and_stay_inside(sizes: tuple[int, int, int]) -> None:
    length, tile, stride = sizes
    assume(stride <= tile)
    spans = tile_spans(length, tile, stride)
    covered = {p for a, b in spans for p in range(a, b)}
    assert covered == set(range(length))
    assert all(0 <= a < b <= length and b - a <= tile for a, b in spans)
    assert all(b > spans[i][1] for i, (_, b) in enumerate(spans[1:])), "a tile lies wholly inside its predecessor"


@given(axis)
def test_every_position_has_weight(sizes: tuple[int, int, int]) -> None:
    length, tile, stride = sizes
    assume(stride <= tile)
    total = torch.zeros(length)
    for a, b in tile_spans(length, tile, stride):
        mask = feather_mask((a, b), length, tile - stride, torch.device("cpu"))
        assert mask.shape == (b - a,) and mask.min() > 0 and mask.max() <= 1
        total[a:b] += mask
    assert total.min() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_blending_an_identity_gives_the_picture_back(h: int, w: int, th: int, tw: int, sh: int, sw: int) -> None:
    assume(sh <= th and sw <= tw)
    x = torch.randn(1, 2, 3, h, w)
    tiling = Tiling((th, tw), (sh, sw))
    out = blend_tiles(x, lambda tile: tile, (3, h, w), tiling, in_scale=1, out_scale=1, channels=2)
    torch.testing.assert_close(out, x)


def test_masks_of_the_reference() -> None:
    """Ramps of (i + 1) / border at inner edges only (reference: build_1d_mask)."""
    mask = feather_mask((4, 12), 20, 4, torch.device("cpu"))
    assert mask.tolist() == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert feather_mask((0, 8), 20, 4, torch.device("cpu")).tolist() == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    overlapping = feather_mask((4, 10), 20, 4, torch.device("cpu"))
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
