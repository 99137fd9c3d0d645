"""Matmuls with their bias and activation fused: right in every dtype, differentiable where autograd
records."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from pusa_fast import native as compiled_part
from pusa_fast import ops
from pusa_fast.native import rows as native
from pusa_fast.ops import registry
from pusa_fast.testing import assert_within_budget, make_input

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [name for name, reason in ops.backends().items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


def layer(dtype: torch.dtype, rows: tuple[int, ...] = (2, 5)) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (
        make_input(*rows, 48, dtype=dtype),
        make_input(33, 48, seed=1, dtype=dtype),
        make_input(33, seed=2, dtype=dtype),
    )
    return x, weight, bias


def gelu(x: Tensor) -> Tensor:
    return nnf.gelu(x, approximate="tanh")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = layer(dtype)
    for given in (
        (x, weight, bias),
        (x, weight, None),
        (x[0, 0], weight, bias),
        (x[:, ::2], weight, bias),
        (x[:0], weight, bias),
    ):
        exact = nnf.linear(*(None if t is None else t.double() for t in given))
        out = ops.linear(*given)
        assert out.dtype == dtype and out.shape == exact.shape
        assert_within_budget(out, nnf.linear(*given), exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(backend: str, dtype: torch.dtype) -> None:
    given = layer(dtype)
    exact = gelu(nnf.linear(*(t.double() for t in given)))
    assert_within_budget(ops.linear_gelu(*given), gelu(nnf.linear(*given)), exact)
    assert ops.linear_gelu(given[0][:0], *given[1:]).shape == (0, 5, 33)


@torch.no_grad()
def test_linear_gelu_is_the_tanh_form(backend: str) -> None:
    """Around -2.3 it differs from the exact form by 2 %, which an error budget set by the largest
    value would hide."""
    x = torch.linspace(-3, -1, 64).to(torch.bfloat16).unsqueeze(1)
    one, zero = torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    exact = gelu(x.double())
    assert (
        (ops.linear_gelu(x, one, zero).double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs()
    ).all()


def test_gradients_where_autograd_records(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for function, plain in ((ops.linear, nnf.linear), (ops.linear_gelu, lambda *given: gelu(nnf.linear(*given)))):
            results = []
            for call, precision in ((function, dtype), (plain, dtype), (plain, torch.float64)):
                leaves = [t.to(precision).requires_grad_() for t in layer(dtype)]
                total = call(*leaves).to(torch.promote_types(precision, torch.float32)).square().sum()
                results.append(torch.autograd.grad(total, leaves))
            for ours, theirs, exact in zip(*results, strict=True):
                assert_within_budget(ours, theirs, exact)


@pytest.mark.skipif(not registry.ONEDNN_BF16, reason="no bf16 matmuls in oneDNN here")
@torch.no_grad()
def test_bf16_takes_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = torch.ops.mkldnn._linear_pointwise

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, *rest: object) -> Tensor:
        seen.append(name)
        return original(x, weight, bias, name, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    given = layer(torch.bfloat16)
    ops.linear(*given)
    ops.linear_gelu(*given)
    assert seen == ["none", "gelu"]
    with ops.use("reference"):
        ops.linear(*given)
    ops.linear(*(t.float() for t in given))
    assert seen == ["none", "gelu"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 17, 48, 256])
def test_linear_rows_takes_each_row_alone(backend: str, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = (
        make_input(7, width),
        make_input(33, width, seed=1, dtype=dtype),
        make_input(33, seed=2, dtype=dtype),
    )
    together = ops.linear_rows(x, weight, bias)
    assert together.dtype == torch.float32
    assert_within_budget(
        together, nnf.linear(x, weight.float(), bias.float()), nnf.linear(*(t.double() for t in (x, weight, bias)))
    )
    for count in (1, 2, 5):
        assert torch.equal(ops.linear_rows(x[:count], weight, bias), together[:count])
    assert torch.equal(ops.linear_rows(x[[3, 3, 3]], weight, bias), together[[3, 3, 3]])
    torch.testing.assert_close(ops.linear_rows(x, weight), together - bias.float())
    assert ops.linear_rows(x[:0], weight, bias).shape == (0, 33)


def test_linear_rows_reads_strided_weights() -> None:
    if native.available():
        pytest.skip(str(native.available()))
    x, weight = make_input(3, 20), make_input(9, 20, seed=1, padded=True)
    torch.testing.assert_close(native.linear_rows(x, weight, None), nnf.linear(x, weight))
    torch.testing.assert_close(native.linear_rows(x, weight.t().contiguous().t(), None), nnf.linear(x, weight))
    from pusa_fast import _native

    out, capsule = torch.empty(3, 9), torch._C._to_dlpack
    for bad in (
        (x[:, :5].contiguous(), weight, None, out),
        (x, weight, torch.zeros(8), out),
        (x, weight, None, out[:2]),
        (x.double(), weight, None, out),
        (x, weight[0], None, out),
        (x, weight.half(), None, out),
    ):
        with pytest.raises(ValueError, match=r"must"):
            _native.linear_rows(*(None if t is None else capsule(t) for t in bad), 1)


def test_linear_rows_is_one_op_under_compile() -> None:
    given = make_input(3, 20), make_input(9, 20, seed=1), make_input(9, seed=2)
    compiled = torch.compile(ops.linear_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), ops.linear_rows(*given))
    if not native.available():
        torch.library.opcheck(torch.ops.pusa_fast.linear_rows, given)


@pytest.mark.parametrize("isa", [] if native.available() else compiled_part.compiled.isas())
def test_linear_rows_on_every_instruction_set(isa: str) -> None:
    before = compiled_part.compiled.isa()
    x, weight = make_input(3, 77), make_input(40, 77, seed=1, dtype=torch.bfloat16)
    try:
        compiled_part.compiled.set_isa(isa)
        out = native.linear_rows(x, weight, None)
    finally:
        compiled_part.compiled.set_isa(before)
    assert_within_budget(out, nnf.linear(x, weight.float()), nnf.linear(x.double(), weight.double()))


def test_gelu_differentiates(backend: str) -> None:
    x, dy = make_input(3, 37, 8, scale=3), make_input(3, 37, 8, seed=1)
    found = {}
    for kind, function in (("ours", ops.gelu), ("torch", gelu), ("exact", gelu)):
        leaf = (x.double() if kind == "exact" else x).clone().requires_grad_()
        (found[kind],) = torch.autograd.grad(function(leaf), leaf, dy.to(leaf.dtype))
    assert_within_budget(found["ours"], found["torch"], found["exact"])


def test_gelu_in_place_leaves_autograd_right(backend: str) -> None:
    leaf = make_input(3, 7).requires_grad_()
    (ours,) = torch.autograd.grad(ops.gelu(leaf * 1, inplace=True).sum(), leaf)
    (theirs,) = torch.autograd.grad(gelu(leaf).sum(), leaf)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        x = make_input(3, 7)
        assert torch.equal(ops.gelu(x.clone(), inplace=True), ops.gelu(x, inplace=True))


def test_an_empty_batch_goes_backward(backend: str) -> None:
    x, row = torch.randn(0, 4, 16, requires_grad=True), torch.ones(16)
    r, n = ops.residual_norm(x, x, gate=row.expand(0, 2, 16), weight=row, bias=row)
    assert torch.autograd.grad((r.sum() + n.sum() + ops.rms_norm(x, row).sum()), x)[0].shape == x.shape
    assert ops.rms_norm(torch.randn(0, 4, 32)[..., ::2], row).shape == (0, 4, 16)


def test_a_backward_pass_keeps_the_backend_of_its_forward_pass() -> None:
    x, row = make_input(1, 4, 16).requires_grad_(), torch.ones(16)
    n = ops.rms_norm(x, row)
    with ops.use("reference"):
        n.sum().backward()
    assert x.grad is not None
