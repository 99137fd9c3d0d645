"""The compiled tiles as such: every instruction set, any strides and threads, hostile arguments.

That results are the formula, for all sizes, is tested in tests/ops/test_tiles.py; builds and
sanitizers in test_vae_tiling_builds.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast import native, ops
from pusa_fast.ops.tiles import Tile, blend_box_
from pusa_fast.testing import assert_within_budget

_native: Any = native.compiled
pytestmark = pytest.mark.skipif(native.missing("blend_box") is not None, reason="no compiled tiles")
ISAS: list[str] = _native.isas() if _native else []
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HUGE = [2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**70, -1, -(2**63), -(2**70)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


# Right results


def random_tiles(dtype: torch.dtype, channels: int) -> list[Tile]:
    """Of 33 frames of 23 x 37: rows have whole vectors of every width, and a rest."""
    areas = [(0, 0, 23, 37), (3, 5, 20, 19), (0, 17, 9, 20), (14, 0, 9, 37)]
    return [Tile(torch.randn(33, h, w, channels).to(dtype), top, left) for top, left, h, w in areas]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_every_instruction_set_is_within_budget(isa: str, dtype: torch.dtype, channels: int) -> None:
    tiles = random_tiles(dtype, channels)
    oracle = torch.empty(33, 23, 37, channels, dtype=torch.float64)
    blend_box_(oracle, [Tile(t.values.double(), t.top, t.left) for t in tiles], borders=(4, 7))
    for out_dtype in (*FLOATS, torch.uint8):
        found, plain = (torch.empty(33, 23, 37, channels, dtype=out_dtype) for _ in range(2))
        blend_box_(found, tiles, borders=(4, 7), rounded=channels == 1)
        with ops.use("reference"):
            blend_box_(plain, tiles, borders=(4, 7), rounded=channels == 1)
        if out_dtype == torch.uint8:
            assert (found.int() - plain.int()).abs().max() <= 1
        else:
            assert_within_budget(found, plain, oracle, isa)


def test_half_precision_is_converted_exactly(isa: str) -> None:
    """Every half to float32; back: halves, midpoints and their neighbours, larger numbers."""

    def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(1, 1, values.numel(), 1, dtype=dtype)
        blend_box_(out, [Tile(values.view(1, 1, -1, 1))])
        return out.flatten()

    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    torch.testing.assert_close(converted(halves, torch.float32), halves.float(), rtol=0, atol=0, equal_nan=True)
    bits = halves.float().view(torch.int32)
    values = torch.cat([bits + step for step in (0, 0xFFF, 0x1000, 0x1001, 0x1FFF)]).view(torch.float32)
    tiny, ends = torch.rand(4096) * 2**-23, [65519.996, 65520.0, 1e30, -1e30, torch.inf, 2**-25, 2**-26]
    values = torch.cat([values, tiny, -tiny, torch.tensor(ends)])
    torch.testing.assert_close(converted(values, torch.float16), values.half(), rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads_gives_the_same(isa: str) -> None:
    tiles, results = random_tiles(torch.float32, 3), []
    for threads in (1, 2, 3, 7, 5000):
        out = torch.empty(33, 23, 37, 3)
        _native.blend_box(out, tiles, (0, 0), (23, 37), (4, 7), False, False, threads, 0)
        results.append(out)
    assert all(torch.equal(results[0], result) for result in results[1:])


@settings(max_examples=30)
@given(st.data())
def test_memory_around_outputs_is_untouched(data: st.DataObject) -> None:
    """Outputs are areas of larger memory; only what they hold changes."""
    before = _native.isa()
    T, H, W, C = shape = [data.draw(st.integers(1, n)) for n in (4, 9, 35, 5)]
    dtype = data.draw(st.sampled_from([torch.uint8, *FLOATS]))
    gap = [*(data.draw(st.integers(0, 2)) for _ in range(3)), 0]
    order = data.draw(st.sampled_from([(0, 1, 2, 3), (1, 0, 2, 3)]))
    sizes = [n + 2 * g for n, g in zip(shape, gap, strict=True)]
    room = torch.full([sizes[i] for i in order], 77, dtype=dtype)
    out = room.permute(order)[tuple(slice(g, g + n) for g, n in zip(gap, shape, strict=True))]
    values = torch.rand(T, H, W, C)
    _native.set_isa(data.draw(st.sampled_from(ISAS)))
    try:
        _native.blend_box(out, [(values, 0, 0)], (0, 0), (H, W), (0, 0), False, False, 2, 0)
    finally:
        _native.set_isa(before)
    expected = (values + 1) * 127.5 if dtype == torch.uint8 else values
    assert torch.equal(out, expected.to(dtype))
    out.fill_(77)
    assert room.eq(77).all()


# Wrong arguments


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("device", "device_id", "ndim")),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))),
        *(("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)),
    ]  # fmt: skip


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


def arguments(**changed: Any) -> list[Any]:
    """A box of 4 x 5 of a picture of 6 x 8, from two tiles; `tile` stands for the first of them."""
    first = changed.pop("tile", None)
    tiles = [(torch.rand(2, 6, 8, 3) if first is None else first, 0, 0), (torch.rand(2, 3, 4, 3), 2, 4)]
    right = {"out": torch.empty(2, 4, 5, 3), "tiles": tiles, "at": (1, 2), "picture": (6, 8), "borders": (2, 2)}
    return list((right | {"clamp": True, "round": False, "threads": 1, "stream": 0} | changed).values())


def at(tile: Any, top: Any = 0, left: Any = 0) -> list[Any]:
    return [(tile, top, left)]


GOOD = torch.rand(2, 6, 8, 3)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"out": torch.empty(4, 5, 3)}, "out must have rank 4"),
    ({"out": torch.empty(2, 4, 5, 6)[..., ::2]}, "last stride of 1"),
    ({"out": torch.empty(2, 4, 5, 4)[..., :3]}, "contiguous rows"),
    ({"out": torch.empty(2, 4, 5, 3, dtype=torch.int8)}, "uint8, float32"),
    ({"out": torch.empty(2, 4, 5, 3).double()}, "uint8, float32"),
    ({"out": torch.empty(2, 1, 5, 3).expand(2, 4, 5, 3)}, "overlap itself"),
    ({"out": torch.empty(99).as_strided((2, 4, 5, 3), (14, 15, 3, 1))}, "overlap itself"),
    ({"out": capsule([2, 4, 5, 3], [60, -15, 3, 1])}, "overlap itself"),
    ({"out": capsule([2, 4, 5, 3], [60, 15, 0, 1])}, "contiguous rows"),
    ({"out": torch.empty(2, 6, 5, 3)}, "the box's rows"),
    ({"out": torch.empty(2, 4, 7, 3)}, "the box's columns"),
    ({"at": (-1, 0)}, "the box's rows"),
    ({"at": (0, 4)}, "the box's columns.*got 5 at 4 of 8"),
    ({"at": (2**63 - 1, 0)}, "the box's rows"),
    ({"picture": (2**63 - 1, 5)}, "the box's columns"),
    ({"borders": (-1, 0)}, "borders"),
    ({"borders": (0, -1)}, "borders"),
    ({"threads": 0}, "threads must be"),
    ({"tiles": []}, "1 to 64"),
    ({"tiles": 65 * at(GOOD)}, "1 to 64, got 65"),
    ({"tiles": at(GOOD, 1)}, "a tile's rows.*got 6 at 1 of 6"),
    ({"tiles": at(GOOD, 0, -1)}, "a tile's columns"),
    ({"tiles": at(GOOD, 2**63 - 1)}, "a tile's rows"),
    ({"tile": GOOD[0]}, "rank 4"),
    ({"tile": GOOD[:1]}, "must have shape"),
    ({"tile": torch.rand(2, 6, 8, 4)}, "must have shape"),
    ({"tile": GOOD.double()}, "float32"),
    ({"tile": (GOOD * 9).to(torch.uint8)}, "one float dtype"),
    ({"tiles": [*at(GOOD), *at(GOOD.half())]}, "one float dtype"),
    ({"tile": torch.rand(2, 6, 16, 3)[:, :, ::2]}, "contiguous rows"),
    ({"tile": capsule([2, 6, 8, 3], kind=(2, 4, 1))}, "float32"),
    ({"tile": capsule([2, 6, 8, 3], kind=(2, 32, 2))}, "float32"),
    ({"tile": capsule([2, 6, 8, 3], offset=2)}, "aligned"),
    ({"tile": capsule([2, -6, 8, 3])}, "0 or more"),
    ({"tile": capsule([2, 6, 8, 3], [2**62, 2**62, 3, 1])}, "fit into memory"),
    ({"out": capsule([2, 4, 5, 3], device=(2, 0))}, "on the device of|must be on the CPU"),
    ({"tile": capsule([2, 6, 8, 3], device=(2, 0))}, "on the device of|must be on the CPU"),
    (
        {"out": capsule([2, 4, 5, 3], device=(2, 0)), "tiles": at(capsule([2, 6, 8, 3], device=(2, 1)))},
        "device of|the CPU",
    ),
    ({"tile": capsule([2, 6, 8, 3], device=(10, 0))}, "must be on the CPU"),  # one that no build serves
    ({"tile": None}, "must be a tensor"),
]  # fmt: skip
WRONG_TYPES: list[dict[str, Any]] = [
    {"at": (0, 2**70)}, {"at": (0,)}, {"picture": None}, {"borders": (1.5, 0)}, {"threads": 2**40}, {"stream": -1},
    {"clamp": "x"}, {"tiles": [GOOD]}, {"tiles": at(GOOD, 2**63)}, {"tiles": 3},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_arguments_are_named(number: int) -> None:
    changed, message = WRONG[number]
    given = arguments(**changed)
    if changed.get("tile", GOOD) is None:
        given[1] = at(None)
    with pytest.raises(ValueError, match=message):
        _native.blend_box(*given)


def test_the_right_arguments_are_taken_and_others_are_type_errors() -> None:
    _native.blend_box(*arguments())
    for changed in WRONG_TYPES:
        with pytest.raises(TypeError):
            _native.blend_box(*arguments(**changed))


def test_huge_views_are_no_huge_work() -> None:
    """Axes without elements say nothing of the others, and tiles of no pixels cover none."""
    empty = torch.zeros(0, 2**40, 2**19, 3)
    _native.blend_box(empty.to(torch.uint8), at(empty), (0, 0), (2**40, 2**19), (0, 0), True, False, 1, 0)
    out = torch.zeros(2, 6, 8, 3)
    _native.blend_box(out, at(torch.zeros(2, 0, 2**40, 3)), (0, 0), (6, 2**40), (0, 0), True, False, 1, 0)
    assert out.isnan().all()


@st.composite
def tensors(draw: st.DrawFn, like: Tensor) -> Any:
    """`like`, or something that is not quite it, or nothing like it."""
    shape = [max(0, n + draw(st.sampled_from([0] * 6 + [-1, 1, -9]))) for n in like.shape]
    shape += draw(st.sampled_from([[], [], [], [], [1]]))
    others = [*FLOATS, torch.uint8, torch.float64, torch.int64, torch.bool]
    room = torch.zeros(4096, dtype=draw(st.sampled_from([like.dtype] * 9 + others)))
    steps, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        steps[i], step = step, step * max(shape[i], 1)
    if draw(st.integers(0, 3)) == 0:
        steps[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 60))
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True) if n)
    return room.as_strided(shape, steps) if reach <= 4096 else draw(st.sampled_from([None, 3, "x", [], room]))


numbers = st.one_of(st.integers(-1, 8), st.sampled_from(HUGE))


@settings(max_examples=600)
@given(st.data())
def test_no_arguments_crash(data: st.DataObject) -> None:
    """They work or are refused; a crash ends the whole run. The sanitizers' test watches memory."""
    out, tiles, *rest = arguments()
    made = [
        (data.draw(tensors(tile)), *data.draw(st.sampled_from([place] * 5) | st.tuples(numbers, numbers)))
        for tile, *place in tiles
    ]
    for i, value in enumerate(rest[:3]):
        rest[i] = data.draw(st.sampled_from([value] * 5) | st.tuples(numbers, numbers))
    rest[5] = data.draw(st.sampled_from([1] * 9 + HUGE))
    try:
        _native.blend_box(data.draw(tensors(out)), made, *rest)
    except (ValueError, TypeError) as error:
        assert str(error)


@pytest.mark.skipif(
    torch.cuda.is_available() or not (_native and _native.cuda_built()), reason="needs CUDA code, no device"
)
def test_without_a_driver_cuda_code_says_so() -> None:
    out, tile = capsule([2, 4, 5, 3], device=(2, 0)), capsule([2, 6, 8, 3], device=(2, 0))
    with pytest.raises(RuntimeError, match="CUDA: "):
        _native.blend_box(*arguments(out=out, tiles=at(tile)))
