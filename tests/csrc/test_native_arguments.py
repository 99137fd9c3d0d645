"""Wrong arguments, straight into the compiled module: a ValueError, and no memory but theirs is
touched."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pusa_fast.native import rows as native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native ops: {native.available()}")
_native: Any = None if native.available() else importlib.import_module("pusa_fast._native")

# B, L, D = 2, 6, 8; F = 3; H, K = 2, 4.
SHAPES = {
    **{"rows": (2, 6, 8), "row": (8,), "table": (2, 3, 8), "stats": (2, 6), "heads": (2, 6, 2, 4)},
    **{"angles": (3, 2), "latent": (1, 2, 3, 4, 4), "frames": (3,), "matrix": (8, 6), "products": (2, 8)},
    **{"pixels": (2, 3, 4, 6, 8), "flat": (8,)},
}
SIGNATURES = {
    "residual_norm_forward": "rows rows table table table - - rows rows stats stats 1e-6 2 0 2",
    "residual_norm_backward": "rows rows rows rows table table - stats stats rows rows table table table - - 2 0 2",
    "gated_residual_forward": "rows rows table rows 2 0 2",
    "gated_residual_backward": "rows rows table rows table 2 0 2",
    "rms_norm_forward": "rows row rows stats 1e-6 2",
    "rms_norm_backward": "rows rows row stats rows row 2",
    "qk_rope_forward": "heads heads row row angles angles heads heads stats stats 3 1 2 0 1e-6 2",
    "qk_rope_backward": "heads heads heads heads row row angles angles stats stats heads heads row row 3 1 2 0 2",
    "guided_euler_step": "latent latent latent frames latent 3.0 2",
    "gelu": "flat flat 2",
    "gelu_backward": "flat flat flat 2",
    "linear_rows": "stats matrix row products 2",
    "vae_act": "pixels flat pixels flat pixels pixels True False 2",
}


def good_arguments(name: str) -> list[Any]:
    return [
        torch.zeros(SHAPES[word]) if word in SHAPES else None if word == "-" else ast.literal_eval(word)
        for word in SIGNATURES[name].split()
    ]


def tensor_places(name: str) -> list[int]:
    return [i for i, word in enumerate(SIGNATURES[name].split()) if word in SHAPES]


WRONG: dict[str, Callable[[Tensor], object]] = {
    "float64": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "on meta": lambda t: torch.empty(t.shape, device="meta"),
    "no tensor": lambda t: t.tolist(),
    "a used capsule": lambda t: _used_capsule(t),
    "columns apart": lambda t: torch.zeros(*t.shape, 2)[..., 0],
}
WRONG_SHAPES: dict[str, Callable[[Tensor], object]] = {
    "a rank less": lambda t: t[0],
    "a rank more": lambda t: t[None],
    "a column more": lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1),
    "no column": lambda t: t[..., :0],
}


def _used_capsule(t: Tensor) -> object:
    capsule = t.__dlpack__()
    torch.from_dlpack(capsule)
    return capsule


@pytest.mark.parametrize("name", SIGNATURES)
def test_good_arguments_are_good(name: str) -> None:
    getattr(_native, name)(*good_arguments(name))


@pytest.mark.parametrize("name", SIGNATURES)
def test_wrong_tensors_are_value_errors(name: str) -> None:
    for place in tensor_places(name):
        for what, change in (WRONG | WRONG_SHAPES).items():
            if what == "a rank more" and SIGNATURES[name].split()[place] == "flat":
                continue  # any shape of as many elements will do
            arguments = good_arguments(name)
            arguments[place] = change(arguments[place])
            with pytest.raises(ValueError, match=r"must|need|goes? together"):
                getattr(_native, name)(*arguments)


def test_other_wrong_arguments() -> None:
    def refuses(name: str, match: str, **changes: Any) -> None:
        arguments = good_arguments(name)
        for place, value in changes.items():
            arguments[int(place[1:])] = value
        with pytest.raises(ValueError, match=match):
            getattr(_native, name)(*arguments)

    for name in SIGNATURES:
        refuses(name, "threads must be at least 1, got 0", **{f"_{len(SIGNATURES[name].split()) - 1}": 0})
    refuses("residual_norm_forward", "r comes with y", _1=None)
    refuses("residual_norm_forward", "r comes with y", _7=None)
    refuses("residual_norm_forward", "neither pair", _3=None)
    refuses("residual_norm_forward", "neither pair", _5=torch.zeros(8), _6=torch.zeros(8))
    refuses("residual_norm_forward", r"scale must have shape \[2, 4, 8\]", _2=torch.zeros(2, 4, 8))
    refuses("residual_norm_forward", "n must have the dtype", _8=torch.zeros(2, 6, 8, dtype=torch.bfloat16))
    refuses("residual_norm_forward", "n must be contiguous", _8=torch.zeros(2, 6, 9)[..., :8])
    refuses("residual_norm_forward", "mean must be float32", _9=torch.zeros(2, 6, dtype=torch.bfloat16))
    refuses("residual_norm_backward", "dy comes with gate", _10=None)
    refuses("residual_norm_backward", "dgate needs gate and y", _3=None)
    refuses("residual_norm_backward", "dscale and dshift", _12=None)
    refuses("residual_norm_backward", "dweight and dbias", _14=torch.zeros(8), _15=torch.zeros(8))
    refuses("residual_norm_backward", r"dgate must have shape \[2, 3, 8\]", _11=torch.zeros(2, 1, 8))
    refuses("gated_residual_backward", "gate is needed", _2=None)
    refuses("qk_rope_forward", r"tokens of the grid \[3, 1, 1\], got 6 from 0", _12=1)
    refuses("qk_rope_forward", r"tokens of the grid \[-3, 1, -2\]", _10=-3, _12=-2)
    refuses("qk_rope_forward", "row for each position", _4=torch.zeros(2, 2))
    refuses("qk_rope_forward", "heads side by side", _0=torch.zeros(2, 2, 6, 4).transpose(1, 2))
    refuses("qk_rope_forward", "even head width", _0=torch.zeros(2, 6, 2, 3))
    refuses("qk_rope_backward", "go together", _13=None)
    pixels = torch.zeros(2, 3, 4, 6, 8)
    refuses("vae_act", "r, out or both", _4=None, _5=None)
    refuses("vae_act", "out needs gamma", _1=None)
    refuses("vae_act", r"y must have shape \[2, 3, 3, 4, 32\]", _7=True)
    refuses("vae_act", "even H and W", _5=torch.zeros(2, 3, 5, 6, 8), _7=True)
    refuses("vae_act", "r must have the dtype", _4=pixels.bfloat16())
    for output in (4, 5):
        refuses("vae_act", "must not be expanded", **{f"_{output}": torch.zeros(2, 3, 1, 6, 8).expand(2, 3, 4, 6, 8)})
    with pytest.raises(ValueError, match="sse9: this build and processor have base"):
        _native.set_isa("sse9")


INT64_MAX = 2**63 - 1
# (tokens_per_frame, first_token) for 6 tokens and 3 frames.
OUTSIDE = [(2, 1), (2, 6), (2, -1), (2, INT64_MAX), (2, -INT64_MAX - 1), (1, 0), (0, 0), (-2, 0), (INT64_MAX, 0)]
INSIDE = [(2, 0), (3, 3), (4, 6), (7, 15), (INT64_MAX // 3, 0), (INT64_MAX // 3, INT64_MAX // 3 * 3 - 6)]


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "residual" in name])
def test_tokens_outside_their_tables_are_value_errors(name: str) -> None:
    arguments = good_arguments(name)
    for where in OUTSIDE:
        arguments[-3:-1] = where
        with pytest.raises(ValueError, match="must have a frame for each of 6 tokens from"):
            getattr(_native, name)(*arguments)
    for where in INSIDE:
        arguments[-3:-1] = where
        getattr(_native, name)(*arguments)
    for frames in (0, 2):  # too few for 6 tokens, 2 to a frame
        arguments = [
            torch.zeros(2, frames, 8) if w == "table" else a
            for w, a in zip(SIGNATURES[name].split(), arguments, strict=True)
        ]
        arguments[-3:-1] = 2, 0
        with pytest.raises(ValueError, match="must have a frame for each of 6 tokens from"):
            getattr(_native, name)(*arguments)


@pytest.mark.parametrize("name", ["qk_rope_forward", "qk_rope_backward"])
def test_tokens_outside_their_grid_are_value_errors(name: str) -> None:
    arguments, at = good_arguments(name), SIGNATURES[name].split().index("3")
    huge = 2**32
    for numbers in [
        *((3, 1, 2, first) for first in (1, 6, -1, INT64_MAX, -INT64_MAX - 1)),
        *((3, 1, -2, 0), (-3, 1, -2, 0), (0, 1, 2, 0), (huge, huge, 1, 0), (huge, 1, huge, 0), (1, 2, 2, 0)),
    ]:
        arguments[at : at + 4] = numbers
        with pytest.raises(ValueError, match="must be tokens of the grid"):
            getattr(_native, name)(*arguments)
    for numbers in ((3, 3, 3, 21), (2, 3, 1, 0), (3, 3, 2, 5)):
        arguments[at : at + 4] = numbers
        getattr(_native, name)(*arguments)


def floats_or_not() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])


@st.composite
def any_tensor(draw: st.DrawFn, like: Tensor) -> Tensor:
    """Of nearly the right shape, of any strides (0 among them), with its data in the middle of
    readable memory."""
    shape = list(like.shape)
    for _ in range(draw(st.integers(0, 2))):
        axis = draw(st.integers(0, len(shape)))
        length = draw(st.sampled_from([0, 1, 2, 3, 5, 6, 12]))
        shape[axis : axis + draw(st.integers(0, 1))] = [length] if draw(st.booleans()) or not shape else []
    strides = list(torch.zeros(shape).stride())
    if shape and draw(st.booleans()):
        strides[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 2, 8, 13]))
    extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n) + 1
    memory = torch.zeros(extent + 64, dtype=draw(floats_or_not()))
    return memory.as_strided(shape, strides, 32)


@pytest.mark.parametrize("name", SIGNATURES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_tensors_work_or_are_value_errors(name: str, data: st.DataObject) -> None:
    arguments = good_arguments(name)
    places = data.draw(st.lists(st.sampled_from(tensor_places(name)), min_size=1, max_size=3, unique=True))
    for place in places:
        arguments[place] = data.draw(st.none() | any_tensor(arguments[place]))
    try:
        getattr(_native, name)(*arguments)
    except ValueError as error:
        assert str(error)
