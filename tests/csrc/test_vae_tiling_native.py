"""The compiled tiling as such: every instruction set, any strides and threads, wrong arguments of every kind, sanitizers,
and that its CUDA half compiles and needs no driver until it is called.

That each function is its formula, for all sizes, is tested in tests/test_tiling.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast.model.vae import blending
from pusa_fast.model.vae.blending import Blend, gather_tiles
from pusa_fast.model.vae.tiling import tile_spans
from pusa_fast.testing import assert_within_budget

ROOT = Path(__file__).parents[2]
_native: Any = blending._native
pytestmark = pytest.mark.skipif(_native is None, reason="no compiled tiling")
ISAS: list[str] = _native.isas() if _native else []
CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HUGE = [2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**70, -1, -(2**63), -(2**70)]
INCLUDES = ["-I", str(ROOT / "csrc")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


# Right results


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_every_instruction_set_is_within_budget(isa: str, dtype: torch.dtype, channels: int) -> None:
    """By way of sums and in one pass; 37 columns hold whole vectors of every width and an end."""
    rows, columns, borders = tile_spans(23, 9, 5), tile_spans(37, 20, 13), (4, 7)
    shape = (33, 23, 37, channels)  # more frames than one task takes
    tiles = [(torch.randn(33, b - t, r - l, channels).to(dtype), t, l) for t, b in rows for l, r in columns]
    plain = Blend(*shape, borders, CPU, dtype, "torch")
    wide = Blend(*shape, borders, CPU, torch.float64, "torch")
    sums = blending._NativeSums(shape, borders, CPU, dtype)
    kept = blending._KeptTiles(shape, borders, CPU, dtype)
    for tile, top, left in tiles:
        plain.add(tile[None], [top], [left])
        wide.add(tile[None].double(), [top], [left])
        for result in (sums, kept):
            result.add(tile[None], [top], [left])
    for result in (sums, kept):
        for out_dtype in FLOATS:
            out = torch.empty(shape, dtype=out_dtype)
            result.finish(out, False, False)
            assert_within_budget(out, plain.values(False).to(out_dtype), wide.values(False), f"{isa} {result}")
        for round in (False, True):
            levels = torch.empty(shape, dtype=torch.uint8)
            result.finish(levels, True, round)
            assert (levels.int() - plain.frames(round).int()).abs().max() <= 1


def test_a_batch_is_its_tiles_one_by_one(isa: str) -> None:
    tiles = torch.randn(6, 3, 7, 9, 2)
    tops, lefts = [0, 0, 0, 5, 5, 5], [0, 6, 12, 0, 6, 12]
    together, single = (blending._NativeSums((3, 12, 21, 2), (2, 3), CPU, torch.float32) for _ in range(2))
    together.add(tiles, tops, lefts)
    for n in range(6):
        single.add(tiles[n : n + 1], tops[n : n + 1], lefts[n : n + 1])
    assert torch.equal(together.sums, single.sums) and torch.equal(together.weight, single.weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_pass_has_the_bits_of_two(isa: str, dtype: torch.dtype) -> None:
    """Same order of additions; and its product with a reciprocal, corrected, rounds as a division does."""
    shape, borders = (5, 60, 90, 3), (17, 29)
    both = [kind(shape, borders, CPU, dtype) for kind in (blending._NativeSums, blending._KeptTiles)]
    for top, bottom in tile_spans(60, 30, 13):
        for left, right in tile_spans(90, 47, 18):
            tile = torch.randn(1, 5, bottom - top, right - left, 3).to(dtype)
            for blend in both:
                blend.add(tile, [top], [left])
    results = [torch.empty(shape) for _ in both]
    for blend, out in zip(both, results, strict=True):
        blend.finish(out, False, False)
    assert torch.equal(*results)


def test_sums_are_not_read_before_they_are_written(isa: str) -> None:
    """What torch.empty holds may be anything."""
    blend = blending._NativeSums((2, 5, 9, 3), (2, 4), CPU, torch.float32)
    blend.sums.fill_(torch.nan)
    tile = torch.randn(1, 2, 5, 6, 3)
    for left in (0, 3):
        blend.add(tile, [0], [left])
    assert blend.sums.isfinite().all()


def test_half_precision_is_converted_exactly(isa: str) -> None:
    """Every half to float32, and back every half, every midpoint and its neighbours, and what lies beyond."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    found = torch.empty(1, 1, 2**16, 1)
    _native.finish_frames(halves.view(1, 1, -1, 1), None, found, False, False, 1, 0)
    assert torch.equal(found.flatten(), halves.float()) or found.flatten().nan_to_num(7).equal(
        halves.float().nan_to_num(7)
    )
    bits = halves.float().view(torch.int32)
    values = torch.cat([bits + step for step in (0, 0xFFF, 0x1000, 0x1001, 0x1FFF)]).view(torch.float32)
    tiny = torch.rand(4096) * 2**-23
    values = torch.cat(
        [values, tiny, -tiny, torch.tensor([65519.996, 65520.0, 1e30, -1e30, torch.inf, 2**-25, 2**-26])]
    )
    out = torch.empty(1, 1, values.numel(), 1, dtype=torch.float16)
    _native.finish_frames(values.view(1, 1, -1, 1), None, out, False, False, 1, 0)
    expected = values.half()
    assert torch.equal(out.flatten().isnan(), expected.isnan())
    assert torch.equal(
        out.flatten().nan_to_num(0, torch.inf, -torch.inf), expected.nan_to_num(0, torch.inf, -torch.inf)
    )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int16, *FLOATS, torch.float64, torch.complex64], ids=str
)
def test_gathers_any_strides_and_elements(dtype: torch.dtype) -> None:
    values = torch.randint(0, 100, (9, 3, 11, 5)).to(dtype)
    for source in (
        values.permute(1, 0, 2, 3),
        values[:, :, 1:, :3],
        values[::2, :, ::3],
        values[:1].expand(9, 3, 11, 5),
    ):
        height, width = source.shape[1] - 1, source.shape[2] - 2
        tops, lefts = [0, 1, 0], [2, 0, 1]
        tiles = torch.empty(3, source.shape[0], height, width, source.shape[3], dtype=dtype)
        _native.gather_tiles(source, tiles, tops, lefts, 2, 0)
        assert torch.equal(tiles, gather_tiles(source, (height, width), tops, lefts, "torch"))


def test_any_number_of_threads_gives_the_same(isa: str) -> None:
    tiles, tops, lefts = torch.randn(4, 70, 20, 24, 3), [0, 0, 12, 12], [0, 16, 0, 16]
    results = []
    for threads in (1, 2, 3, 7, 5000):
        sums, weight = torch.zeros(70, 32, 40, 3), torch.zeros(32, 40)
        _native.blend_tiles(tiles, sums, weight, tops, lefts, 8, 8, threads, 0)
        frames, once, cut = torch.empty(70, 32, 40, 3), torch.empty(70, 32, 40, 3), torch.empty_like(tiles)
        _native.finish_frames(sums, weight, frames, False, False, threads, 0)
        _native.finish_tiles(list(tiles), tops, lefts, 8, 8, once, False, False, threads)
        _native.gather_tiles(frames, cut, tops, lefts, threads, 0)
        results.append((sums, weight, frames, once, cut))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@settings(max_examples=30)
@given(st.data())
def test_memory_around_outputs_is_untouched(data: st.DataObject) -> None:
    """Outputs are areas of larger memory, of any strides that are allowed; only what they hold changes."""
    isa = data.draw(st.sampled_from(ISAS))
    T, H, W, C = (data.draw(st.integers(1, n)) for n in (4, 9, 35, 5))
    dtype = data.draw(st.sampled_from([torch.uint8, *FLOATS]))
    gap = [data.draw(st.integers(0, 2)) for _ in range(4)]
    shape = [n + 2 * g for n, g in zip((T, H, W, C), gap, strict=True)]
    order = data.draw(st.sampled_from([(0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3)]))
    room = torch.full([shape[i] for i in order], 77, dtype=dtype)
    area = room.permute(*(order.index(i) for i in range(4)))
    out = area[tuple(slice(g, g + n) for g, n in zip(gap, (T, H, W, C), strict=True))]
    acc = torch.rand(T, H, W, C).to(data.draw(st.sampled_from(FLOATS)))
    before = _native.isa()
    _native.set_isa(isa)
    try:
        if data.draw(st.booleans()):
            _native.finish_frames(acc, None, out, True, False, 2, 0)
        else:
            _native.finish_tiles([acc], [0], [0], 0, 0, out, True, False, 2)
    finally:
        _native.set_isa(before)
    if dtype == torch.uint8:
        assert (out.int() - blending.finish_frames(acc, False, backend="torch").int()).abs().max() <= 1
    else:
        torch.testing.assert_close(out, acc.to(dtype), rtol=2**-7, atol=0)
    out.fill_(77)
    assert room.eq(77).all()


# Wrong arguments


class DLTensor(ctypes.Structure):
    _fields_ = [
        *(
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32),
            ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
        ),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))),
        *(("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)),
    ]


_alive: list[Any] = []


def capsule(
    shape: list[int],
    strides: list[int] | None = None,
    *,
    kind: tuple[int, int, int] = (2, 32, 1),
    device: tuple[int, int] = (1, 0),
    offset: int = 0,
) -> object:
    """A DLPack capsule that says what torch would not."""
    memory = ctypes.create_string_buffer(1 << 16)
    axes = (ctypes.c_int64 * len(shape))(*shape)
    steps = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
    address = (ctypes.addressof(memory) + 63) // 64 * 64 + offset
    tensor = DLTensor(address, *device, len(shape), *kind, axes, steps, 0, None, None)
    _alive.append((memory, axes, steps, tensor, name := b"dltensor"))
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    made: object = make(ctypes.addressof(tensor), name, None)
    return made


def gather_arguments() -> dict[str, Any]:
    return {
        "source": torch.rand(2, 6, 8, 3),
        "tiles": torch.empty(2, 2, 4, 5, 3),
        "tops": [0, 2],
        "lefts": [0, 3],
        "threads": 1,
        "stream": 0,
    }


def blend_arguments() -> dict[str, Any]:
    arrays = {"tiles": torch.rand(2, 2, 4, 5, 3), "acc": torch.zeros(2, 6, 8, 3), "weight": torch.zeros(6, 8)}
    return dict(**arrays, tops=[0, 2], lefts=[0, 3], border_h=2, border_w=2, threads=1, stream=0)


def finish_arguments() -> dict[str, Any]:
    arrays = {
        "acc": torch.rand(2, 6, 8, 3),
        "weight": torch.ones(6, 8),
        "out": torch.empty(2, 6, 8, 3, dtype=torch.uint8),
    }
    return dict(**arrays, clamp=True, round=False, threads=1, stream=0)


def once_arguments() -> dict[str, Any]:
    out = torch.empty(2, 6, 8, 3, dtype=torch.uint8)
    places = {"tops": [0, 2], "lefts": [0, 3], "border_h": 2, "border_w": 2}
    return dict(
        tiles=[torch.rand(2, 4, 5, 3), torch.rand(2, 3, 4, 3)], **places, out=out, clamp=True, round=False, threads=1
    )


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "gather_tiles": gather_arguments,
    "blend_tiles": blend_arguments,
    "finish_frames": finish_arguments,
    "finish_tiles": once_arguments,
}


def call(name: str, **changed: Any) -> None:
    getattr(_native, name)(*(CALLS[name]() | changed).values())


def overlapping(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows one element apart."""
    return torch.zeros(4096, dtype=dtype).as_strided(
        shape, (0, 0, 1, 1)[-len(shape) :] if len(shape) < 5 else (0, 0, 0, 1, 1)
    )


ONE_MEMORY = torch.zeros(4096)
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gather_tiles", {"source": torch.rand(6, 8, 3)}, "rank 4"),
    ("gather_tiles", {"source": torch.rand(2, 6, 8, 6)[..., ::2]}, "last stride of 1"),
    ("gather_tiles", {"source": torch.rand(2, 6, 8, 3).half()}, "dtype of source"),
    ("gather_tiles", {"source": torch.rand(2, 6, 8, 3, dtype=torch.complex128)}, "1, 2, 4 or 8 bytes"),
    ("gather_tiles", {"source": capsule([2, 6, 8, 3], kind=(2, 4, 1))}, "1, 2, 4 or 8 bytes"),
    ("gather_tiles", {"source": torch.rand(3, 6, 8, 3)}, "frames of source"),
    ("gather_tiles", {"source": torch.rand(2, 6, 8, 4)}, "channels of source"),
    ("gather_tiles", {"tiles": torch.empty(2, 2, 4, 10, 3)[:, :, :, ::2]}, "contiguous"),
    ("gather_tiles", {"tiles": torch.empty(2, 2, 0, 5, 3)}, "at least one"),
    ("gather_tiles", {"tops": [0, 3]}, "tops must keep a tile of 4 inside 6 pixels, got 3"),
    ("gather_tiles", {"lefts": [4, 0]}, "lefts must keep"),
    ("gather_tiles", {"tops": [0]}, "one entry for each of 2"),
    ("gather_tiles", {"tops": [0, -1]}, "got -1"),
    ("gather_tiles", {"tops": [0, 2**70]}, "64 bits"),
    ("gather_tiles", {"tops": [2, 2], "lefts": [1, 1]}, r"\(2, 1\) twice"),
    ("gather_tiles", {"source": ONE_MEMORY[:288].view(2, 6, 8, 3), "tiles": ONE_MEMORY[287:527].view(2, 2, 4, 5, 3)}, "share"),
    ("gather_tiles", {"stream": 1}, "stream must be 0"),
    ("blend_tiles", {"tiles": torch.rand(2, 2, 4, 5, 3).double()}, "float32, bfloat16 or float16"),
    ("blend_tiles", {"tiles": torch.zeros(2, 2, 4, 5, 3, dtype=torch.int32)}, "float32, bfloat16 or float16"),
    ("blend_tiles", {"tiles": torch.rand(2, 2, 4, 10, 3)[:, :, :, ::2]}, "side by side"),
    ("blend_tiles", {"tiles": torch.rand(2, 2, 7, 5, 3)}, "tile of 7 inside 6"),
    ("blend_tiles", {"tiles": torch.rand(2, 3, 4, 5, 3)}, "frames of acc"),
    ("blend_tiles", {"acc": torch.zeros(2, 6, 8, 3).bfloat16()}, "acc must be float32"),
    ("blend_tiles", {"acc": torch.zeros(0, 6, 8, 3), "tiles": torch.rand(2, 0, 4, 5, 3)}, "at least one"),
    ("blend_tiles", {"acc": overlapping(2, 6, 8, 3)}, "overlap itself|side by side"),
    ("blend_tiles", {"acc": torch.zeros(1, 6, 8, 3).expand(2, 6, 8, 3)}, "overlap itself"),
    ("blend_tiles", {"weight": torch.zeros(6, 1).expand(6, 8)}, "contiguous"),
    ("blend_tiles", {"weight": torch.zeros(8, 6)}, r"\[6, 8\]"),
    ("blend_tiles", {"weight": torch.zeros(6, 8).half()}, "weight must be float32"),
    ("blend_tiles", {"acc": ONE_MEMORY[:288].view(2, 6, 8, 3), "weight": ONE_MEMORY[287:335].view(6, 8)}, "share"),
    ("blend_tiles", {"acc": ONE_MEMORY[:288].view(2, 6, 8, 3), "tiles": ONE_MEMORY[100:340].view(2, 2, 4, 5, 3)}, "share"),
    ("blend_tiles", {"border_h": -1}, "border_h must be"),
    ("blend_tiles", {"border_w": 2**63}, "border_w must be"),
    ("blend_tiles", {"threads": 0}, "threads must be"),
    ("blend_tiles", {"stream": -1}, "stream must be"),
    ("finish_frames", {"acc": torch.rand(2, 6, 8, 3).double()}, "float32, bfloat16 or float16"),
    ("finish_frames", {"out": torch.empty(2, 6, 8, 3, dtype=torch.int8)}, "uint8, float32"),
    ("finish_frames", {"out": torch.empty(2, 6, 9, 3, dtype=torch.uint8)}, "must have shape"),
    ("finish_frames", {"out": torch.empty(2, 6, 8, 1, dtype=torch.uint8).expand(2, 6, 8, 3)}, "last stride"),
    ("finish_frames", {"out": torch.empty(2, 1, 8, 3, dtype=torch.uint8).expand(2, 6, 8, 3)}, "overlap itself"),
    ("finish_frames", {"out": torch.empty(99, dtype=torch.uint8).as_strided((2, 6, 8, 3), (23, 5, 3, 1))}, "overlap itself"),
    ("finish_frames", {"acc": ONE_MEMORY[:288].view(2, 6, 8, 3), "out": ONE_MEMORY[1:289].view(2, 6, 8, 3)}, "share"),
    ("finish_frames", {"weight": ONE_MEMORY[:48].view(6, 8), "out": ONE_MEMORY[:288].view(2, 6, 8, 3)}, "share"),
    ("finish_frames", {"acc": capsule([2, 6, 8, 3], offset=2)}, "aligned"),
    ("finish_frames", {"acc": capsule([2, -6, 8, 3])}, "0 or more"),
    ("finish_frames", {"acc": capsule([2, 6, 8, 3], [2**62, 2**62, 3, 1])}, "fit into memory"),
    ("finish_frames", {"out": capsule([2, 6, 8, 3], [144, -24, 3, 1])}, "overlap itself"),
    ("finish_tiles", {"tiles": [], "tops": [], "lefts": []}, "at least one tile"),
    ("finish_tiles", {"tiles": [torch.rand(2, 4, 5, 3), torch.rand(2, 4, 5, 3).half()]}, "dtype of the others"),
    ("finish_tiles", {"tiles": [torch.rand(2, 4, 5, 3), torch.rand(2, 5, 5, 3)]}, "tile of 5 inside 6"),
    ("finish_tiles", {"tiles": [torch.rand(2, 4, 5, 3)]}, "one entry for each of 1"),
    ("finish_tiles", {"tops": [0, 0], "lefts": [3, 3]}, "twice"),
    ("finish_tiles", {"out": torch.empty(1, 6, 8, 3, dtype=torch.uint8).expand(2, 6, 8, 3)}, "overlap itself"),
    ("finish_tiles", {"threads": 2**40 - 2**41}, "threads must be"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda n: f"{WRONG[n][0]}-{n}")
def test_wrong_arguments_are_named(number: int) -> None:
    name, changed, message = WRONG[number]
    with pytest.raises(ValueError, match=message):
        call(name, **changed)


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_are_taken(name: str) -> None:
    call(name)


sizes = st.one_of(st.integers(-3, 80), st.sampled_from(HUGE))


@given(st.tuples(*[sizes] * 6))
def test_plans_of_any_numbers(numbers: tuple[int, ...]) -> None:
    """A plan, or a ValueError: never an endless loop, nor all of the memory."""
    try:
        plan = _native.tile_plan(*numbers)
    except ValueError:
        height, width, tile_h, tile_w, stride_h, stride_w = numbers
        valid = min(numbers) > 0 and max(numbers) < 2**63 and stride_h <= tile_h and stride_w <= tile_w
        assert not valid or (height // stride_h + 1) * (width // stride_w + 1) > 2**20
    else:
        assert plan[0][0] == plan[0][2] == 0 and plan[-1][1::2] == numbers[:2]


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn, like: Tensor) -> Any:
    """`like`, or something that is not quite it, or nothing like it."""
    shape = [max(0, n + draw(st.sampled_from([0] * 6 + [-1, 1, -9]))) for n in like.shape]
    shape += draw(st.sampled_from([[], [], [], [], [1]]))
    dtype = draw(st.sampled_from([like.dtype] * 9 + DTYPES))
    room = torch.zeros(4096, dtype=dtype)
    steps, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        steps[i], step = step, step * max(shape[i], 1)
    if draw(st.integers(0, 3)) == 0:
        steps[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 60))
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True) if n)
    return room.as_strided(shape, steps) if reach <= 4096 else draw(st.sampled_from([None, 3, "x", [], room]))


@st.composite
def arguments(draw: st.DrawFn) -> tuple[str, list[Any]]:
    name = draw(st.sampled_from(sorted(CALLS)))
    made: list[Any] = []
    for key, value in CALLS[name]().items():
        if isinstance(value, Tensor):
            made.append(draw(tensors(value)))
        elif key == "tiles":
            made.append([draw(tensors(tile)) for tile in value])
        elif isinstance(value, list):
            near = st.lists(st.integers(-1, 4), min_size=2, max_size=2)
            made.append(draw(st.one_of(st.just(value), near, st.lists(st.sampled_from(HUGE), max_size=3))))
        elif isinstance(value, bool):
            made.append(draw(st.booleans()))
        else:
            made.append(draw(st.sampled_from([value] * 9 + [0, 1, 7, *HUGE])) if key != "stream" else 0)
    return name, made


@settings(max_examples=600)
@given(arguments())
def test_no_arguments_crash(drawn: tuple[str, list[Any]]) -> None:
    """They work or are refused; a crash ends the whole run. The sanitizers' test watches memory."""
    name, made = drawn
    try:
        getattr(_native, name)(*made)
    except (ValueError, TypeError) as error:
        assert str(error)


def test_huge_views_are_no_huge_work() -> None:
    """Axes without elements say nothing of the others."""
    with pytest.raises(ValueError):
        call(
            "blend_tiles",
            acc=torch.zeros(0, 2**40, 2**20, 3),
            tiles=torch.zeros(1, 0, 2**40, 2**20, 3),
            tops=[0],
            lefts=[0],
        )
    empty = torch.zeros(0, 2**40, 2**19, 3)
    _native.finish_frames(empty, None, empty.to(torch.uint8), True, False, 1, 0)
    _native.gather_tiles(torch.rand(2, 6, 8, 3), torch.empty(0, 2, 2**30, 2**20, 3), [], [], 1, 0)


def test_tensors_of_two_devices_are_refused() -> None:
    wanted = "on the device of|must be on the CPU"
    for name, key in (("gather_tiles", "source"), ("blend_tiles", "weight"), ("finish_frames", "out")):
        shape = list(CALLS[name]()[key].shape)
        with pytest.raises(ValueError, match=wanted):
            call(name, **{key: capsule(shape, device=(2, 0))})
    with pytest.raises(ValueError, match=wanted):  # two devices of one kind
        call("gather_tiles", source=capsule([2, 6, 8, 3], device=(2, 0)), tiles=capsule([2, 2, 4, 5, 3], device=(2, 1)))
    with pytest.raises(ValueError, match="must be on the CPU"):  # one that no build serves
        call("gather_tiles", source=capsule([2, 6, 8, 3], device=(10, 0)))
    with pytest.raises(ValueError, match="must be on the CPU"):  # ops that have no CUDA code
        call("finish_tiles", out=capsule([2, 6, 8, 3], device=(2, 0)))
    with pytest.raises(ValueError, match="must be on the CPU"):
        _native.gelu(capsule([4], device=(2, 0)), capsule([4]), 1)


# CUDA and sanitizers

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def run(*command: str, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def load_native(library: Path) -> str:
    """Source that makes `module` of this very file, whatever is installed."""
    spec = f"importlib.util.spec_from_file_location('_native', {str(library)!r})"
    load = f"spec = {spec}; module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)"
    return f"import importlib.util; {load}"


@pytest.mark.skipif(
    torch.cuda.is_available() or not (_native and _native.cuda_built()), reason="needs CUDA code, no device"
)
def test_without_a_driver_cuda_code_says_so() -> None:
    with pytest.raises(RuntimeError, match="CUDA: "):
        call("gather_tiles", source=capsule([2, 6, 8, 3], device=(2, 0)), tiles=capsule([2, 2, 4, 5, 3], device=(2, 0)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
def test_imports_without_a_driver() -> None:
    """Alone, so that torch brings nothing: no library of CUDA's is asked for."""
    source = f"""{load_native(Path(_native.__file__))}
assert module.tile_plan(4, 4, 2, 2, 2, 2)
assert "libcuda" not in open("/proc/self/maps").read()
"""
    run(sys.executable, "-c", source)


def compile_cuda(arch: str, folder: Path) -> None:
    """Without spills."""
    source = str(ROOT / "csrc" / "vae_tiling.cu")
    log = run(
        "nvcc", "-std=c++17", f"-arch=sm_{arch}", *INCLUDES, "-Xptxas=-v", "-c", source, "-o", str(folder / "tiling.o")
    )
    spills = [line for line in log.splitlines() if "spill" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@needs_nvcc
def test_compiles_for_cuda(tmp_path: Path) -> None:
    compile_cuda("90", tmp_path)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "100", "120"])
def test_compiles_for_other_devices(arch: str, tmp_path: Path) -> None:
    compile_cuda(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan on the CPU code: random plans of odd sizes, every buffer exactly as large as it must be."""
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *INCLUDES]
    flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    options: dict[str, list[str]] = {"base": []}
    if "avx2" in ISAS:
        options |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512bw", "-mfma"]}
    define = ["-DPUSA_X86_KERNELS"] if len(options) > 1 else []
    objects = []
    for isa, extra in options.items():
        objects.append(str(tmp_path / f"{isa}.o"))
        run(
            "g++",
            *flags,
            *extra,
            f"-DPUSA_ISA={isa}",
            "-c",
            str(ROOT / "csrc" / "vae_tiling_rows.cpp"),
            "-o",
            objects[-1],
        )
    program = str(tmp_path / "fuzz")
    sources = [str(ROOT / "csrc" / "vae_tiling.cpp"), str(ROOT / "tests" / "csrc" / "vae_tiling_fuzz.cpp")]
    run("g++", *flags, *define, *sources, *objects, "-o", program)
    for index, isa in enumerate(options):
        if isa in ISAS:
            assert "all well" in run(program, str(index), "1500")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_cuda_kernels_on_threads_are_the_cpu_s(sanitizer: str, tmp_path: Path) -> None:
    """The CUDA kernels, their blocks' threads emulated: the bits of the CPU's, no access outside memory, no race in a block."""
    flags = ["-std=c++20", "-O1", "-g", "-ffp-contract=fast", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags += [
        "-I",
        str(ROOT / "tests" / "csrc" / "cuda_on_cpu"),
        *INCLUDES,
        "-DPUSA_ISA=base",
        "-DPUSA_BLOCK_THREADS=8",
    ]
    sources = [
        ROOT / "csrc" / "vae_tiling_rows.cpp",
        ROOT / "csrc" / "vae_tiling.cpp",
        ROOT / "tests" / "csrc" / "vae_tiling_emulated.cpp",
    ]
    program = str(tmp_path / "emulated")
    run("g++", *flags, *map(str, sources), "-x", "c++", str(ROOT / "csrc" / "vae_tiling.cu"), "-o", program, "-pthread")
    assert "all well" in run(program, "60")


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["OFF", pytest.param("ON", marks=needs_nvcc)])
def test_wheel_builds_with_and_without_cuda(cuda: str, tmp_path: Path) -> None:
    options = [f"-Ccmake.define.PUSA_CUDA={cuda}", f"-Cbuild-dir={tmp_path / 'build'}"]
    run(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", *options, "-w", str(tmp_path), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")
    (library,) = (tmp_path / "wheel" / "pusa_fast").glob(f"_native{EXTENSION_SUFFIXES[0]}")
    found = run(
        sys.executable,
        "-c",
        f"{load_native(library)}; print(module.cuda_built(), module.tile_plan(4, 4, 2, 2, 2, 2)[0])",
    )
    assert found.strip() == f"{cuda == 'ON'} (0, 2, 0, 2)"
