"""What the VAE's activation refuses, by every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pusa_fast import ops
from pusa_fast.kernels import reference

Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrong(**changes: Any) -> Arguments:
    pixels = {name: torch.zeros(1, 2, 4, 6, 8) for name in ("y", "x", "r", "out")}
    return pixels | {"gamma": torch.zeros(8), "bias": torch.zeros(8)} | changes


same = torch.zeros(1, 2, 4, 6, 8)
row = torch.zeros(1, 2, 4, 7, 8)
WRONG: dict[str, tuple[Arguments, str]] = {
    "nothing to write": (wrong(r=None, out=None), "give r, out or both"),
    "no gamma": (wrong(gamma=None), "out needs gamma"),
    "rank": (wrong(out=torch.zeros(2, 4, 6, 8)), r"\[B, T, H, W, C\]"),
    "integers": (wrong(y=torch.zeros(1, 2, 4, 6, 8, dtype=torch.int32)), "float"),
    "y's shape": (wrong(y=torch.zeros(1, 2, 4, 6, 9)), r"y must be \[1, 2, 4, 6, 8\]"),
    "x's shape": (wrong(x=torch.zeros(1, 2, 4, 5, 8)), r"x must be \[1, 2, 4, 6, 8\], got"),
    "r's shape": (wrong(r=torch.zeros(1, 1, 4, 6, 8)), "r must be"),
    "dtype": (wrong(out=torch.zeros(1, 2, 4, 6, 8, dtype=torch.bfloat16)), "out must be torch.float32"),
    "device": (wrong(x=torch.zeros(1, 2, 4, 6, 8, device="meta")), "x must be .* on cpu"),
    "gamma's size": (wrong(gamma=torch.zeros(7)), "gamma must have C=8"),
    "bias is no float": (wrong(bias=torch.zeros(8, dtype=torch.int64)), "bias must be a float"),
    "channels apart": (wrong(y=torch.zeros(1, 2, 4, 6, 16)[..., ::2]), "y must have its channels side by side"),
    "expanded output": (wrong(out=torch.zeros(1, 1, 4, 6, 8).expand(1, 2, 4, 6, 8)), "out cannot be expanded"),
    "expanded r": (wrong(r=torch.zeros(1, 2, 4, 1, 8).expand(1, 2, 4, 6, 8)), "r cannot be expanded"),
    "odd size of an upsampling": (wrong(upsampled=True, out=torch.zeros(1, 2, 5, 6, 8)), "even H and W"),
    "y of an upsampling": (wrong(upsampled=True), r"y must be \[1, 2, 3, 4, 32\]"),
    "out is x": (wrong(x=same, out=same), "out cannot be the memory of x"),
    "out is y": (wrong(y=same, out=same), "out cannot be the memory of"),
    "out is r": (wrong(r=same, out=same), "out cannot be the memory of"),
    "r begins with x": (
        wrong(x=row[:, :, :, :6], r=row.view(-1)[: 2 * 4 * 6 * 8].view(1, 2, 4, 6, 8)),
        "r can be x only",
    ),
    "r begins with an upsampling's y": (
        wrong(upsampled=True, y=(many := torch.zeros(1, 2, 3, 4, 32)), r=many.view(-1)[:384].view(1, 2, 4, 6, 8)),
        "r can be y only",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(ops_backend: str, case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ops.vae_act_(**arguments)


def test_right_arguments_are_right(ops_backend: str) -> None:
    ops.vae_act_(**wrong())


def test_refuses_to_be_recorded(ops_backend: str) -> None:
    arguments = wrong(gamma=torch.ones(8, requires_grad=True))
    ops.vae_act_(**arguments)
    with torch.enable_grad(), pytest.raises(ValueError, match="inference only"):
        ops.vae_act_(**arguments)


def test_meta_tensors_are_checked_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a meta tensor reached the arithmetic")

    monkeypatch.setattr(reference, "vae_act", forbidden)
    arguments = {name: t.to("meta") for name, t in wrong().items()}
    ops.vae_act_(**arguments)
    with pytest.raises(ValueError, match="y must be"):
        ops.vae_act_(**(arguments | {"y": torch.zeros(1, 2, 4, 6, 9, device="meta")}))
    inner = torch.ops.pusa_fast.vae_act_
    names = ("y", "gamma", "x", "bias", "r", "out")
    inner(*(arguments[name] for name in names), True, False)
