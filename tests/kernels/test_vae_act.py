"""The VAE's activation: bias, residual, RMS norm over channels and SiLU, by every backend.

Wrong arguments: test_vae_act_arguments.py. Instruction sets, numbers of threads and wrong tensors
of the native code itself: tests/csrc/test_native.py.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.testing import assert_within_budget, make_input

# Under the interpreter numpy warns of what the hardware passes over.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE = (torch.float32, torch.bfloat16)
# What there is apart from y: each form that the VAE calls, and more.
FORMS = (
    *("out", "bias out", "bias x r out", "r", "bias x r", "x out", "bias r out identity", "x out identity"),
    *("bias r out upsampled", "out upsampled", "bias x r upsampled", "bias x r out upsampled identity"),
)
B, T = 2, 3
POISON = 77.0
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Arguments = dict[str, Any]


@pytest.fixture
def device(ops_backend: str) -> str:
    return "cuda" if ops_backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Any:
    with torch.no_grad():
        yield


def skip_unless_supported(ops_backend: str, dtype: torch.dtype) -> None:
    if ops_backend == "native" and dtype not in NATIVE:
        pytest.skip("native ops take float32 and bf16")


def buffer(shape: tuple[int, ...], dtype: torch.dtype, device: str, fill: float) -> tuple[Tensor, Tensor]:
    """(memory, a view in its middle): neighbours on every axis, channel rows 16 apart or more."""
    room = [n + 2 for n in shape[:-1]] + [shape[-1] + 16]
    memory = torch.full(room, fill, dtype=dtype, device=device)
    return memory, memory[tuple(slice(1, n + 1) for n in shape[:-1])][..., 8 : 8 + shape[-1]]


def placed(values: Tensor) -> Tensor:
    """The same in the middle of NaN."""
    view = buffer(tuple(values.shape), values.dtype, str(values.device), math.nan)[1]
    return view.copy_(values)


def make(form: str, size: tuple[int, int, int], dtype: torch.dtype, device: str, scale: float = 1.0) -> Arguments:
    """The inputs of `form`, by name, contiguous. gamma and bias in float32, shaped as stored."""
    H, W, C = size
    words = form.split()
    y_shape = (B, T, H // 2 + 1, W // 2 + 1, 4 * C) if "upsampled" in words else (B, T, H, W, C)
    made: Arguments = {"y": make_input(*y_shape, dtype=dtype, device=device, scale=scale)}
    if "x" in words:
        made["x"] = make_input(B, T, H, W, C, seed=1, dtype=dtype, device=device, scale=scale)
    if "bias" in words:
        made["bias"] = make_input(C, seed=2, device=device, scale=scale)
    if "out" in words:
        made["gamma"] = make_input(C, 1, 1, 1, seed=3, device=device, scale=2)
    return made | {"silu": "identity" not in words, "upsampled": "upsampled" in words}


def as_double(given: Arguments) -> Arguments:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}


def check(form: str, given: Arguments, r: Tensor | None, out: Tensor | None) -> None:
    """r as plain torch rounds it, bit for bit; out within the error budget."""
    low_r, low_out = reference.vae_act(**given)
    if r is not None:
        torch.testing.assert_close(r, low_r, rtol=0, atol=0, equal_nan=True)
    if out is not None and low_out is not None:
        if out.dtype == torch.float64:  # where the oracle is no better
            torch.testing.assert_close(out, low_out, rtol=1e-13, atol=1e-13)
        else:
            oracle = reference.vae_act(**as_double(given))[1]
            assert oracle is not None
            assert_within_budget(out, low_out, oracle, form)


def run(form: str, given: Arguments, shape: tuple[int, ...]) -> None:
    """The op between poisoned neighbours, none of which it reads or writes."""
    words, y = form.split(), given["y"]
    memory, views = {}, {}
    for name in {"r", "out"} & set(words):
        memory[name], views[name] = buffer(shape, y.dtype, str(y.device), POISON)
    inputs = {name: placed(given[name]) if name in ("x", "y") else given[name] for name in given}
    ops.vae_act_(**inputs, **views)
    check(form, given, views.get("r"), views.get("out"))
    for name, view in views.items():
        view.fill_(POISON)
        assert bool((memory[name] == POISON).all()), f"{form}: wrote around {name}"


@each_dtype
@pytest.mark.parametrize("channels", [3, 8, 10, 96])
def test_every_form(ops_backend: str, device: str, channels: int, dtype: torch.dtype) -> None:
    skip_unless_supported(ops_backend, dtype)
    for form in FORMS:
        H, W = (6, 4) if "upsampled" in form else (5, 7)
        run(form, make(form, (H, W, channels), dtype, device), (B, T, H, W, channels))


@pytest.mark.parametrize("channels", [1, 16, 33, 192, 384, 1024])
def test_other_widths(ops_backend: str, device: str, channels: int) -> None:
    for form, dtype in itertools.product(("bias x r out", "bias r out upsampled"), NATIVE):
        run(form, make(form, (2, 4, channels), dtype, device), (B, T, 2, 4, channels))


def test_layouts_give_the_same_bits(ops_backend: str, device: str) -> None:
    """Frames of a window, part of a picture, and axes in any order, as well as all side by side."""
    given = make("bias x r out", (5, 7, 8), torch.bfloat16, device)
    shape = (B, T, 5, 7, 8)
    r, out = (
        torch.empty(shape, dtype=torch.bfloat16, device=device),
        torch.empty(shape, dtype=torch.bfloat16, device=device),
    )
    ops.vae_act_(**given, r=r, out=out)
    check("contiguous", given, r, out)

    def like(place: str) -> Tensor:
        memory = torch.full((B + 1, T + 2, 8, 9, 8), math.nan, dtype=torch.bfloat16, device=device)
        views = {
            "frames": memory[:B, 2:],
            "rows": memory[:B, :T, 1:6],
            "columns": memory[:B, :T, :, 1:8],
        }
        if place == "batch inside":
            return torch.empty(T, 5, 7, B, 8, dtype=torch.bfloat16, device=device).permute(3, 0, 1, 2, 4)
        if place == "columns first":
            return torch.empty(B, 7, 5, T, 8, dtype=torch.bfloat16, device=device).permute(0, 3, 2, 1, 4)
        return views[place][:B, :T, :5, :7]

    for place in ("frames", "rows", "columns", "batch inside", "columns first"):
        views = {name: like(place).copy_(given[name]) for name in ("x", "y")}
        found = {name: like(place) for name in ("r", "out")}
        ops.vae_act_(**(given | views), **found)
        assert torch.equal(found["r"], r) and torch.equal(found["out"], out), place
        ops.vae_act_(**(given | views), r=found["r"], out=(dense := torch.empty_like(out)))
        assert torch.equal(found["r"], r) and torch.equal(dense, out), f"{place}, then contiguous"


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_r_takes_the_place_of_an_input(ops_backend: str, device: str, dtype: torch.dtype) -> None:
    for form, name in (
        ("bias x r out", "x"),
        ("bias x r out", "y"),
        ("bias x r", "y"),
        ("bias x r out upsampled", "x"),
    ):
        given = make(form, (4, 6, 10), dtype, device)
        before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
        given[name] = placed(given[name])
        out = torch.empty((B, T, 4, 6, 10), dtype=dtype, device=device) if "out" in form else None
        ops.vae_act_(**given, r=given[name], out=out)
        check(form, before, given[name], out)


@each_dtype
def test_extreme_pixels(ops_backend: str, device: str, dtype: torch.dtype) -> None:
    """Zeros give zeros; squares that under- or overflow in the tensors' dtype do not in the sum."""
    skip_unless_supported(ops_backend, dtype)
    big, small = {torch.float16: (6e4, 6e-8)}.get(dtype, (1e17, 1e-30))
    y = make_input(1, 1, 2, 3, 40, dtype=dtype, device=device).sign() * torch.tensor(
        [[0.0, big, small], [1.0, 1e-3, 1e-7]], dtype=dtype, device=device
    ).unsqueeze(-1)
    given = {"y": y, "gamma": make_input(40, seed=1, device=device)}
    out = torch.full_like(y, math.nan)
    ops.vae_act_(**given, out=out)
    check("extreme", given, None, out)
    assert bool((out[0, 0, 0, 0] == 0).all()) and bool((out[0, 0, 0, 1] != 0).any())
    lone = {"y": y[..., 1:2, :], "gamma": given["gamma"]}  # a budget of its own, not that of the largest
    check("alone", lone, None, out[..., 1:2, :])


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 40.0, -1000.0])
def test_silu_over_its_range(ops_backend: str, device: str, gamma: float, dtype: torch.dtype) -> None:
    """One channel far from the others: arguments of +-sqrt(C) gamma, where exp overflows too."""
    y = torch.linspace(-1, 1, 40 * 40, device=device).view(1, 1, 40, 1, 40).to(dtype)
    y[..., ::7] *= 30
    given = {"y": y, "gamma": torch.full((40,), gamma, device=device)}
    out = torch.full_like(y, math.nan)
    ops.vae_act_(**given, out=out)
    check("range", given, None, out)
    exact = reference.vae_act(**as_double(given))[1]
    assert exact is not None
    # What SiLU makes of small and of negative arguments, too, is right in most of its digits.
    near = (exact.abs() > 1e-30) & (out.double() != 0)
    error = ((out.double() - exact) / exact)[near].abs().max()
    # Rounding of the argument, 88 times as much after the exponential, and of the result; a tenth
    # for the rest.
    assert float(error) < 88 * 4 * torch.finfo(torch.float32).eps + 1.1 * torch.finfo(dtype).eps / 2


def test_not_a_number_stays_in_its_pixel(ops_backend: str, device: str) -> None:
    given = make("bias x r out", (2, 17, 40), torch.bfloat16, device)
    given["y"][0, 0, 0, 5, 3] = math.nan
    given["x"][0, 1, 0, 2, 39] = math.inf
    r, out = torch.empty_like(given["y"]), torch.empty_like(given["y"])
    ops.vae_act_(**given, r=r, out=out)
    low_r, low_out = reference.vae_act(**given)
    assert low_out is not None
    torch.testing.assert_close(r, low_r, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.isnan(), low_out.isnan()) and int(out.isnan().sum()) == 41


def test_ties_of_the_residual(ops_backend: str, device: str) -> None:
    """Sums of two bf16 are often half way between two others: r takes the even one."""
    y = torch.arange(128, 128 + 96, device=device).to(torch.bfloat16).expand(1, 1, 4, 8, 96).contiguous()
    x = torch.full_like(y, 0.5)
    r = torch.empty_like(y)
    ops.vae_act_(y, x=x, r=r)
    assert torch.equal(r, (y.float() + 0.5).bfloat16()) and not torch.equal(r, y)


def test_gamma_and_bias_of_any_dtype_and_shape(ops_backend: str, device: str) -> None:
    given = make("bias out", (2, 3, 10), torch.float32, device)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rows = {
            "gamma": given["gamma"].to(dtype).view(1, 10, 1),
            "bias": given["bias"].to(dtype).repeat_interleave(2)[::2],
        }
        out = torch.empty_like(given["y"])
        ops.vae_act_(**(given | rows), out=out)
        check("rows", given | rows, None, out)


def test_empty(ops_backend: str, device: str) -> None:
    for shape in ((0, 3, 2, 2, 8), (1, 0, 2, 2, 8), (1, 3, 2, 2, 0)):
        y = torch.empty(shape, device=device)
        gamma = torch.empty(shape[-1], device=device)
        ops.vae_act_(y, gamma, out=torch.empty_like(y), r=torch.empty_like(y))


def test_the_formula_by_hand() -> None:
    """The norm reads the sum before it is rounded, and what leaves is rounded once."""
    y, x = (make_input(1, 1, 8, 8, 40, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    gamma, bias = make_input(40, seed=2), make_input(40, seed=3)
    r, out = reference.vae_act(y, gamma, x, bias)
    s = y.double() + bias.double() + x.double()
    n = s / s.square().sum(-1, keepdim=True).sqrt() * math.sqrt(40) * gamma.double()
    exact = n / (1 + torch.exp(-n))
    plain = reference.vae_act(y, gamma, x, bias, silu=False)[1]
    assert out is not None and plain is not None
    for found, wanted in ((r, s), (out, exact), (plain, n)):
        assert float(((found.double() - wanted) / wanted).abs().max()) < 1.1 * torch.finfo(torch.bfloat16).eps / 2


def test_phases_are_those_of_an_upsampling_convolution() -> None:
    """Nearest upsampling and a 3 x 3 convolution are one 2 x 2 convolution of 4 * C channels."""
    x, weight = make_input(1, 5, 4, 6, dtype=torch.float64), make_input(7, 5, 3, 3, seed=1, dtype=torch.float64)
    expected = nnf.conv2d(nnf.interpolate(x, scale_factor=2), weight, padding=1)
    taps = {0: ([0], [1, 2]), 1: ([0, 1], [2])}  # of a phase: which of the three see the same low pixel
    phases = [
        torch.stack([torch.stack([weight[:, :, i][:, :, :, j].sum((2, 3)) for j in taps[e]], -1) for i in taps[a]], -2)
        for a, e in itertools.product((0, 1), repeat=2)
    ]
    y = nnf.conv2d(x, torch.cat(phases), padding=1).permute(0, 2, 3, 1).unsqueeze(1)
    r, out = reference.vae_act(y, upsampled=True)
    assert out is None
    torch.testing.assert_close(r[:, 0].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("ops_backend", ["triton"], indirect=True)
def test_many_programs(ops_backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as on a GPU, and finer, where the interpreter would take everything as one tile."""
    monkeypatch.setattr(importlib.import_module("pusa_fast.kernels._launch"), "interpreted", lambda: False)
    monkeypatch.setattr(importlib.import_module("pusa_fast.kernels.vae_act"), "_PIXELS", 8)
    for form in ("bias x r out", "bias r out upsampled"):
        run(form, make(form, (6, 4, 10), torch.float32, device), (B, T, 6, 4, 10))


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("ops_backend", ["triton", "native"], indirect=True)
def test_offsets_beyond_31_bits(ops_backend: str, device: str, axis: int) -> None:
    """Frames, then pixels, 2^30 elements apart: 8 GiB of addresses, few pages of them touched."""
    far = torch.empty_strided((3 * 2**30 + 4096,), (1,), dtype=torch.bfloat16, device=device)

    def spread(shape: tuple[int, ...], start: int) -> Tensor:
        strides = [0, 0, shape[3] * shape[4], shape[4], 1]
        strides[axis] = 2**30
        return far.as_strided(shape, strides, start)

    frames, size = (T, (2, 2, 8)) if axis == 1 else (1, (2, 4, 8))
    for form in ("bias x r out", "bias r out upsampled") if axis == 1 else ("bias x r out",):
        given = make(form, size, torch.bfloat16, device)
        given = {name: v[:1, :frames, :, :3] if name in ("x", "y") else v for name, v in given.items()}
        shape = (1, frames, *size[:1], min(size[1], 3), size[2])
        streams = [name for name in ("x", "y") if name in given]
        views = {name: spread(tuple(given[name].shape), 1024 * i).copy_(given[name]) for i, name in enumerate(streams)}
        r, out = spread(shape, 2048), spread(shape, 3072)
        ops.vae_act_(**(given | views), r=r, out=out)
        check(form, given, r, out)


@pytest.mark.parametrize("ops_backend", ["triton", "native"], indirect=True)
def test_opcheck(ops_backend: str, device: str) -> None:
    op = torch.ops.pusa_fast.vae_act_.default
    for form in ("bias x r out", "out", "bias x r", "bias r out upsampled"):
        given = make(form, (2, 4, 8), torch.float32, device)
        empty = {n: torch.zeros(B, T, 2, 4, 8, device=device) if n in form.split() else None for n in ("r", "out")}
        rows = (given.get(name) for name in ("y", "gamma", "x", "bias"))
        torch.library.opcheck(op, (*rows, *empty.values(), True, given["upsampled"]))


def test_compiled_is_eager(ops_backend: str, device: str) -> None:
    def step(y: Tensor, gamma: Tensor, x: Tensor, window: Tensor) -> Tensor:
        ops.vae_act_(y * 2, gamma, out=window[:, 2:], x=x, r=x)
        return window + 1

    def results(function: Any) -> tuple[Tensor, ...]:
        given = make("x out", (2, 4, 8), torch.float32, device)
        window = torch.zeros(B, T + 2, 2, 4, 8, device=device)
        return function(given["y"], given["gamma"], given["x"], window), given["x"], window

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled), results(step), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_backend_that_lacks_the_dtype_is_not_chosen() -> None:
    """Half precision on the CPU is plain torch's."""
    given = make("bias out", (2, 3, 10), torch.float16, "cpu")
    out = torch.empty_like(given["y"])
    ops.vae_act_(**given, out=out)
    check("half", given, None, out)
