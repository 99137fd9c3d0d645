"""Noising and the flow-matching loss with its gradient: every backend against float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import ops
from pusa_fast.kernels import reference
from pusa_fast.testing import assert_within_budget, make_input

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 4, 2, 5), (1, 2, 3, 7, 1), (2, 1, 2, 16, 8), (1, 2, 2, 33, 65)]  # B, C, F, h, w
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton(interpreter_as_the_hardware: None) -> Iterator[None]:
    pytest.importorskip("triton")
    with ops.use("triton"):
        yield


def make(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: str = DEVICE) -> tuple[Tensor, ...]:
    """Two latents and a number in (0, 1) for each frame, of which the first is 0."""
    x, y = (make_input(*shape, seed=i, dtype=t, device=device) for i, t in enumerate(dtypes))
    frames = torch.linspace(0, 0.9, shape[0] * shape[2], device=device).view(shape[0], shape[2])
    return x, y, frames


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def loss_and_gradient(
    flow_loss: Callable[..., tuple[Tensor, Tensor]], velocity: Tensor, *others: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = velocity.detach().requires_grad_()
    loss, frame_errors = flow_loss(leaf, *others)
    (gradient,) = torch.autograd.grad(loss * scale, leaf)
    return loss.detach(), frame_errors, gradient


def check_loss(velocity: Tensor, target: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    found = loss_and_gradient(ops.flow_loss, velocity, target, weight, scale=scale)
    low = loss_and_gradient(reference.flow_loss, velocity, target, weight, scale=scale)
    exact = loss_and_gradient(reference.flow_loss, *doubles(velocity, target, weight), scale=scale)
    for name, *three in zip(("loss", "frame_errors", "gradient"), found, low, exact, strict=True):
        assert_within_budget(*three, what=name)
    assert found[2].dtype == velocity.dtype and not found[1].requires_grad
    return found


# Noising.


@pytest.mark.parametrize("noise", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clean", DTYPES, ids=str)
def test_noise_and_target(ops_backend: str, clean: torch.dtype, noise: torch.dtype) -> None:
    for shape in SHAPES:
        inputs = make(shape, (clean, noise), device_of(ops_backend))
        exact = reference.noise_and_target(*doubles(*inputs))
        for dtype in (None, torch.bfloat16, torch.float32):
            x_t, target = ops.noise_and_target(*inputs, dtype)
            assert x_t.dtype == (dtype or clean) and target.dtype == torch.float32
            for found, low, oracle in zip(
                (x_t, target), reference.noise_and_target(*inputs, dtype), exact, strict=True
            ):
                assert found.is_contiguous()
                assert_within_budget(found, low, oracle)


def test_noising_by_hand(ops_backend: str) -> None:
    """Each frame of each clip takes its own level; levels 0 and 1 give the inputs, bit for bit."""
    device = device_of(ops_backend)
    clean, noise, _ = make((2, 3, 2, 3, 3), (torch.float32,) * 2, device)
    sigma = torch.tensor([[0.0, 1.0], [0.25, 0.5]], device=device)
    x_t, target = ops.noise_and_target(clean, noise, sigma)
    assert torch.equal(x_t[0, :, 0], clean[0, :, 0]) and torch.equal(x_t[0, :, 1], noise[0, :, 1])
    torch.testing.assert_close(x_t[1, :, 0], 0.75 * clean[1, :, 0] + 0.25 * noise[1, :, 0])
    torch.testing.assert_close(x_t[1, :, 1], 0.5 * clean[1, :, 1] + 0.5 * noise[1, :, 1])
    assert torch.equal(target, noise - clean)


def test_doubles_stay_doubles(ops_backend: str) -> None:
    clean, noise, sigma = make((1, 2, 2, 3, 3), (torch.float32, torch.float64), device_of(ops_backend))
    x_t, target = ops.noise_and_target(clean, noise, sigma)
    assert (x_t.dtype, target.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(target, noise - clean.double(), rtol=1e-15, atol=1e-15)
    loss, errors, gradient = loss_and_gradient(ops.flow_loss, clean, noise, sigma)
    assert (loss.dtype, errors.dtype, gradient.dtype) == (torch.float64, torch.float64, torch.float32)


# The loss.


@pytest.mark.parametrize("velocity", DTYPES, ids=str)
def test_flow_loss(ops_backend: str, velocity: torch.dtype) -> None:
    for shape in SHAPES:
        check_loss(*make(shape, (velocity, torch.float32), device_of(ops_backend)))


def test_flow_loss_by_hand(ops_backend: str) -> None:
    """Errors of 1 and 2 in the two frames of a clip, 3 and 4 in those of another."""
    device = device_of(ops_backend)
    errors = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    velocity = errors[:, None, :, None, None].expand(2, 3, 2, 4, 5) + 0.5
    weight = torch.tensor([[1.0, 0.5], [2.0, 0.0]], device=device)
    target = torch.full_like(velocity, 0.5)
    loss, frame_errors, gradient = loss_and_gradient(ops.flow_loss, velocity, target, weight)
    assert float(loss) == pytest.approx((1 * 1 + 0.5 * 4 + 2 * 9) / 4)
    torch.testing.assert_close(frame_errors, errors**2)
    expected = (2 / velocity.numel() * weight * errors)[:, None, :, None, None].expand_as(velocity)
    torch.testing.assert_close(gradient, expected)


def test_half_precision_gradients_do_not_underflow(ops_backend: str) -> None:
    """2 / N of a real clip is below float16's resolution: a scaled loss still has its slopes."""
    velocity, target, weight = make((1, 2, 2, 33, 65), (torch.float16, torch.float32), device_of(ops_backend))
    _, _, gradient = check_loss(velocity, target, weight * 1e-4, scale=2.0**24)
    assert (gradient[:, :, 1] != 0).float().mean() > 0.99


def test_any_strides(ops_backend: str) -> None:
    """Gaps hold NaN; each layout gives the bits of the contiguous one."""
    x, y, frames = make((2, 3, 4, 2, 5), (torch.float32,) * 2, device_of(ops_backend))

    def padded(t: Tensor) -> Tensor:
        return t.new_full((*t.shape[:-1], t.shape[-1] + 2), math.nan)[..., :-2].copy_(t)

    def frames_first(t: Tensor) -> Tensor:
        return t.movedim(2, 0).contiguous().movedim(0, 2)

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last_3d)

    def window(t: Tensor) -> Tensor:
        return torch.cat([torch.full_like(t[:, :, :1], math.nan), t], dim=2)[:, :, 1:]

    spaced = torch.stack([frames, torch.full_like(frames, math.nan)], dim=2)[..., 0]
    noising, loss = ops.noise_and_target(x, y, frames), loss_and_gradient(ops.flow_loss, x, y, frames)
    exact = {"rtol": 0, "atol": 0} if ops_backend == "triton" else {}  # torch sums in another order
    for place in (padded, frames_first, channels_last, window):
        for other in (place, torch.clone):
            torch.testing.assert_close(ops.noise_and_target(place(x), other(y), spaced), noising, rtol=0, atol=0)
            found = loss_and_gradient(ops.flow_loss, place(x), other(y), spaced)
            torch.testing.assert_close(found, loss, **exact)


def test_empty(ops_backend: str) -> None:
    """As torch's own mean: the average of nothing is NaN."""
    for shape in ((0, 2, 3, 4, 5), (1, 2, 0, 4, 5), (1, 2, 3, 0, 5)):
        x, y, frames = make(shape, (torch.float32,) * 2, device_of(ops_backend))
        assert [t.shape for t in ops.noise_and_target(x, y, frames)] == [shape, shape]
        loss, frame_errors, gradient = loss_and_gradient(ops.flow_loss, x, y, frames)
        assert loss.isnan() and frame_errors.shape == (shape[0], shape[2]) and gradient.shape == shape


def test_a_nan_is_not_hidden_by_a_weight_of_zero(ops_backend: str) -> None:
    velocity, target, weight = make((1, 2, 3, 4, 5), (torch.float32,) * 2, device_of(ops_backend))
    assert weight[0, 0] == 0
    velocity[0, 1, 0, 2, 2] = math.nan
    loss, frame_errors = ops.flow_loss(velocity, target, weight)
    assert loss.isnan() and frame_errors.isnan().tolist() == [[True, False, False]]


# What only the kernels can get wrong.


def test_memory_is_written_before_it_is_read(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN until then. Cut finer than on a GPU: the interpreter takes one tile."""
    planes = importlib.import_module("pusa_fast.kernels._planes")
    flow = importlib.import_module("pusa_fast.kernels.flow")
    for module, name, size in ((planes, "_INTERPRETER_TILE", 32), (planes, "_TILE", 32), (planes, "_MAX_BLOCK", 16)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(flow, "_INTERPRETER_BLOCK", 32)
    monkeypatch.setattr(flow, "_BLOCK", 32)
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(math.nan))
    for shape in ((2, 1, 3, 3, 7), (1, 3, 1, 4, 4)):
        x, y, frames = make(shape, (torch.float32,) * 2)
        check_loss(x, y, frames)
        exact = reference.noise_and_target(*doubles(x, y, frames))
        for found, low, oracle in zip(
            ops.noise_and_target(x, y, frames), reference.noise_and_target(x, y, frames), exact, strict=True
        ):
            assert_within_budget(found, low, oracle)


def test_no_slope_is_written_where_none_is_wanted(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = importlib.import_module("pusa_fast.kernels.suite")
    forward, slopes = suite.flow_loss_forward, []

    def recorded(*args: Any) -> Any:
        results = forward(*args)
        slopes.append(results[2])
        return results

    monkeypatch.setattr(suite, "flow_loss_forward", recorded)
    velocity, target, weight = make((1, 2, 3, 4, 5), (torch.bfloat16, torch.float32))
    validation = ops.flow_loss(velocity, target, weight)[0]
    leaf = velocity.detach().requires_grad_()
    with torch.no_grad():
        frozen = ops.flow_loss(leaf, target, weight)[0]
    training = ops.flow_loss(leaf, target, weight)[0]
    assert [slope is None for slope in slopes] == [True, True, False]
    assert (validation.requires_grad, frozen.requires_grad, training.requires_grad) == (False, False, True)
    assert torch.equal(validation, training) and torch.equal(frozen, training)


def test_gradcheck(triton: None) -> None:
    velocity, target, weight = make((2, 2, 3, 2, 3), (torch.float64,) * 2)
    leaf = velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.flow_loss(v, target, weight)[0], (leaf,))
    assert torch.autograd.gradcheck(lambda v: ops.flow_loss(v, target, weight)[0] ** 2, (leaf,))


def test_there_is_no_second_derivative(triton: None) -> None:
    """Rather than a wrong one: the slope is a constant to autograd."""
    velocity, target, weight = make((1, 2, 3, 2, 3), (torch.float32,) * 2)
    leaf = velocity.requires_grad_()
    loss, _ = ops.flow_loss(leaf, target, weight)
    (gradient,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_the_backward_pass_outlives_a_forced_backend(interpreter_as_the_hardware: None) -> None:
    pytest.importorskip("triton")
    velocity, target, weight = make((1, 2, 3, 4, 5), (torch.bfloat16, torch.float32))
    leaf = velocity.requires_grad_()
    with ops.use("triton"):
        loss, _ = ops.flow_loss(leaf, target, weight)
        (inside,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], inside)


def test_opcheck(triton: None) -> None:
    x, y, frames = make((1, 2, 3, 2, 5), (torch.bfloat16, torch.float32))
    namespace = torch.ops.pusa_fast
    torch.library.opcheck(namespace.noise_and_target.default, (x.transpose(0, 1).transpose(0, 1), y, frames, x.dtype))
    torch.library.opcheck(namespace.flow_loss.default, (x.clone().requires_grad_(), y, frames, True))
    torch.library.opcheck(namespace.flow_loss.default, (x, y, frames, False))
    torch.library.opcheck(namespace.flow_loss_backward.default, (x, torch.tensor(2.0, device=x.device)))


def test_compiled_is_eager(ops_backend: str) -> None:
    clean, noise, sigma = make((1, 2, 3, 2, 5), (torch.bfloat16, torch.float32), device_of(ops_backend))

    def step(gain: Tensor) -> tuple[Tensor, Tensor]:
        x_t, target = ops.noise_and_target(clean, noise, sigma, torch.float32)
        return ops.flow_loss(x_t * gain, target, sigma)

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        gain = torch.tensor(0.7, device=clean.device, requires_grad=True)
        loss, errors = function(gain)
        return loss.detach(), errors, torch.autograd.grad(loss, gain)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(step), rtol=0, atol=0)


# What is refused.

_X = (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": torch.zeros(2, 3)}, r"clean must be \[B, C, F, h, w\], got \[2, 3\]"),
        (
            {"noise": torch.zeros(1, 2, 3, 4, 4)},
            r"noise must have clean's shape \[1, 2, 3, 4, 5\], got \[1, 2, 3, 4, 4\]",
        ),
        ({"sigma": torch.zeros(3)}, r"sigma must be \[B=1, F=3\], got \[3\]"),
        ({"noise": torch.zeros(_X, dtype=torch.int64)}, "noise must be a float tensor, got torch.int64"),
        ({"sigma": torch.zeros(1, 3, device="meta")}, "sigma is on meta, but the op runs on cpu"),
        ({"dtype": torch.uint8}, "dtype must be a float dtype, got torch.uint8"),
        ({"clean": torch.zeros(_X).requires_grad_()}, "no derivative by clean: detach it"),
        ({"noise": torch.zeros(_X).requires_grad_()}, "no derivative by noise: detach it"),
    ],
)
def test_bad_noising_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"clean": torch.zeros(_X), "noise": torch.zeros(_X), "sigma": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match=f"noise_and_target: .*{message}"):
        ops.noise_and_target(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(2, 3)}, r"velocity must be \[B, C, F, h, w\], got \[2, 3\]"),
        ({"target": torch.zeros(1, 2, 3, 4, 4)}, r"target must have velocity's shape \[1, 2, 3, 4, 5\]"),
        ({"weight": torch.zeros(3, 1)}, r"weight must be \[B=1, F=3\], got \[3, 1\]"),
        ({"weight": torch.zeros(1, 3, dtype=torch.int64)}, "weight must be a float tensor"),
        ({"target": torch.zeros(_X, device="meta")}, "target is on meta"),
        ({"target": torch.zeros(_X).requires_grad_()}, "no derivative by target: detach it"),
        ({"weight": torch.zeros(1, 3).requires_grad_()}, "no derivative by weight: detach it"),
    ],
)
def test_a_bad_loss_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"velocity": torch.zeros(_X), "target": torch.zeros(_X), "weight": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match=f"flow_loss: .*{message}"):
        ops.flow_loss(**{**arguments, **change})


def test_leaves_are_taken_where_no_graph_is_recorded() -> None:
    clean, noise, sigma = make(_X, (torch.float32,) * 2, "cpu")
    with torch.no_grad():
        x_t, _ = ops.noise_and_target(clean.requires_grad_(), noise, sigma)
    assert not x_t.requires_grad
