"""e4m3 rows: equal to torch's division and cast, sign of zero apart; GELU's within its budget."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.testing import assert_within_budget, error_budget, make_input

pytest.importorskip("triton")
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this GPU has no e4m3", allow_module_level=True)

# Under the interpreter numpy warns of what the hardware passes over.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

fp8 = importlib.import_module("pusa_fast.kernels.fp8")
interpreter = importlib.import_module("triton.runtime.interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 17), (2, 3, 160), (4, 1, 640), (33, 5)]
FUNCTIONS = [fp8.quantize_rows, fp8.gelu_quantize_rows]


@pytest.fixture(autouse=True)
def _fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds once, like the hardware; the interpreter's own rounds twice."""

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


def expand(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def check(x: Tensor, q: Tensor, scale: Tensor) -> None:
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert q.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
    assert q.is_contiguous() and scale.is_contiguous()
    expected = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    assert torch.equal(scale, expected)
    assert torch.equal(q.float(), e4m3(x.float() / scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_rows_is_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_input(*shape, dtype=dtype, device=DEVICE, scale=3.0)
    x *= torch.linspace(1e-3, 1, shape[-1], device=DEVICE).to(dtype)  # subnormals of e4m3 as well
    check(x, *fp8.quantize_rows(x))


def test_ties_go_to_even() -> None:
    """x / scale halfway between two numbers of e4m3, for scales whose reciprocal is rounded."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scales = torch.arange(1, 64, 2, dtype=torch.float32)[:, None]
    ties = torch.cat([(numbers[:-1] + numbers[1:]) / 2, torch.tensor([448.0])]) * scales
    check(x := torch.cat([ties, -ties], dim=1).to(DEVICE), *fp8.quantize_rows(x))


def test_error_is_half_a_step_of_e4m3() -> None:
    x = make_input(64, 333, device=DEVICE)
    exact, low = x.double(), expand(*reference.quantize_rows(x))
    assert_within_budget(expand(*fp8.quantize_rows(x)), low, exact)
    normal = x.abs() > x.abs().amax(-1, keepdim=True) * 2**-6 / 448
    error = (expand(*fp8.quantize_rows(x)) - x).abs()[normal]
    assert bool((error <= x.abs()[normal] * 2**-4 * (1 + 2**-20)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_quantize_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_input(*shape, dtype=dtype, device=DEVICE, scale=3.0)
    q, scale = fp8.gelu_quantize_rows(x)
    assert q.shape == x.shape and q.is_contiguous() and scale.is_contiguous()
    exact, low = (nnf.gelu(x.to(t), approximate="tanh") for t in (torch.float64, torch.float32))
    scales = [t.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448 for t in (low, exact)]
    assert_within_budget(scale, *scales, "scale")
    # Each is the cast of a number that a float32 GELU may give.
    budget = error_budget(low, exact)
    assert bool((e4m3((exact - budget) / scale) <= q.float()).all())
    assert bool((e4m3((exact + budget) / scale) >= q.float()).all())


def test_gelu_of_large_numbers_does_not_overflow() -> None:
    x = torch.tensor([[-3e38, -1e20, -100.0, -0.0, 0.0, 100.0, 1e20, 3e38]], device=DEVICE)
    q, scale = fp8.gelu_quantize_rows(x)
    assert torch.equal(scale, torch.tensor([[3e38]], device=DEVICE) / 448)
    assert q.float().tolist() == [[0.0] * 7 + [448.0]]


def test_huge_and_tiny_values() -> None:
    largest = torch.finfo(torch.float32).max
    rows = [
        [largest, -largest, 1.0],
        [1e-30, -1e-38, 0.0],
        [448.0, -448.0, 447.9],
        [1e-12, 0.5e-12, -1e-12],
        [465, 1, -8],
    ]
    check(x := torch.tensor(rows, device=DEVICE), *fp8.quantize_rows(x))


@pytest.mark.parametrize("quantize", FUNCTIONS)
def test_rows_of_zeros(quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    x = torch.zeros(3, 40, device=DEVICE)
    x[1] = make_input(40, device=DEVICE)
    q, scale = quantize(x)
    assert torch.equal(scale[[0, 2]], torch.full((2, 1), 1e-12, device=DEVICE) / 448)
    assert not q[[0, 2]].float().any() and torch.isfinite(expand(q, scale)).all()


@pytest.mark.parametrize("quantize", FUNCTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_comes_back_as_nan(
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]], value: float
) -> None:
    """All of it, and no other row."""
    x = make_input(3, 40, device=DEVICE)
    expected, row_scale = quantize(x)
    x[1, 7] = value
    q, scale = quantize(x)
    assert torch.isnan(expand(q, scale)[1]).all()
    assert torch.equal(q[[0, 2]].float(), expected[[0, 2]].float()) and torch.equal(scale[[0, 2]], row_scale[[0, 2]])


@pytest.mark.parametrize("quantize", FUNCTIONS)
def test_any_strides(quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Gaps hold NaN; each layout gives the bits of the contiguous one."""
    x = make_input(2, 3, 20, device=DEVICE)
    gap = make_input(2, 3, 20, device=DEVICE, padded=True)
    half = torch.stack([x, torch.full_like(x, math.nan)], dim=2)[:, :, 0]
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    column = torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    expected, row_scale = quantize(x)
    for view in (gap, half, swapped, column):
        q, scale = quantize(view)
        assert torch.equal(q.float(), expected.float()) and torch.equal(scale, row_scale)
        assert q.is_contiguous()


def test_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as on a GPU where the interpreter would take everything as one tile."""
    launch = importlib.import_module("pusa_fast.kernels._launch")
    monkeypatch.setattr(fp8, "row_launch", lambda rows, width, per_thread: launch.RowLaunch(2, 32, 1, -(-rows // 2)))
    check(x := make_input(7, 20, device=DEVICE), *fp8.quantize_rows(x))


def test_empty_and_too_wide() -> None:
    for shape in ((0, 8), (2, 0, 8)):
        q, scale = fp8.quantize_rows(torch.empty(shape, device=DEVICE))
        assert q.shape == shape and scale.shape == (*shape[:-1], 1)
    with pytest.raises(ValueError, match="at most 16384 elements, got 16385"):
        fp8.quantize_rows(torch.zeros(1, 16385, device=DEVICE))


def test_offsets_beyond_31_bits() -> None:
    """Rows 2^30 elements apart: 4 GiB of addresses, of which a few pages are touched."""
    x = make_input(3, 20, dtype=torch.bfloat16, device=DEVICE)
    far = torch.empty_strided((2 * 2**30 + 64,), (1,), dtype=torch.bfloat16, device=DEVICE).as_strided(
        (3, 20), (2**30, 1)
    )
    far.copy_(x)
    check(x, *fp8.quantize_rows(far))


def test_devices_without_e4m3_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or later .*, this is cpu"):
        fp8.quantize_rows(torch.zeros(1, 8))
    for capability in ((8, 0), (8, 6), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
        with pytest.raises(ValueError, match=rf"this is A100, {capability[0]}\.{capability[1]}"):
            fp8.check_fp8_device(torch.device("cuda"))
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        fp8.check_fp8_device(torch.device("cuda"))


@pytest.mark.parametrize("name", ["quantize_rows", "gelu_quantize_rows"])
def test_opcheck_and_compile(name: str) -> None:
    x = make_input(2, 3, 20, device=DEVICE)[:, ::2]
    public = getattr(ops, name)
    with ops.use("triton"):
        torch.library.opcheck(getattr(torch.ops.pusa_fast, name).default, (x,))
        results = torch.compile(public, fullgraph=True, backend="aot_eager")(x)
        for result, value in zip(results, public(x), strict=True):
            assert torch.equal(result.float(), value.float())
