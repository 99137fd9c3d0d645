"""What is wrong with an op's arguments, said with the value and what it should be."""

from __future__ import annotations

from torch import Tensor

Named = dict[str, Tensor | None]


def shape(x: Tensor | None) -> list[int] | None:
    return None if x is None else list(x.shape)


def require(condition: bool, op: str, message: str, got: Tensor | None) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}, got {shape(got)}")


def check_tensors(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """x and the others are float tensors on one device. Raises ValueError naming the one that is
    not."""
    device = x.device
    for name, t in (("x", x), *tensors.items()):
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"{op}: {name} must be a float tensor, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, but the op runs on {device}: move it there")


def check_frames(op: str, L: int, F: int | None, tokens_per_frame: int | None, first_token: int) -> int:
    """Tokens to a frame where L tokens from `first_token` on read tables of F frames (None: no
    table).

    Without tokens_per_frame the L tokens are all of the F frames. Raises ValueError.
    """
    if F is None:
        return max(L, 1)
    if tokens_per_frame is None:
        if first_token:
            raise ValueError(f"{op}: first_token {first_token} needs tokens_per_frame: these are not all tokens")
        if F <= 0 or L % F:
            raise ValueError(
                f"{op}: {L} tokens do not divide into {F} frames: a part of a sequence needs tokens_per_frame"
            )
        return max(L // F, 1)
    if tokens_per_frame < 1 or first_token < 0 or first_token + L > F * tokens_per_frame:
        raise ValueError(
            f"{op}: tables of {F} frames with tokens_per_frame {tokens_per_frame} have no row for some of the {L} "
            f"tokens from first_token {first_token} on"
        )
    return tokens_per_frame


def check_residual(
    op: str,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    rows: Named,
    tokens_per_frame: int | None,
    first_token: int,
) -> int:
    """Arguments of residual_norm and gated_residual; rows: scale, shift, weight, bias. Returns the
    tokens to a frame.

    Raises ValueError.
    """
    require(x.ndim == 3, op, "x must be [B, L, D]", x)
    check_tensors(op, x, y=y, gate=gate, **rows)
    B, L, D = x.shape
    if y is not None and y.shape != x.shape:
        raise ValueError(f"{op}: y must have x's shape {shape(x)}, got {shape(y)}")
    if gate is not None and y is None:
        raise ValueError(f"{op}: gate given without y: there is nothing to gate")
    given = {"gate": gate} | rows
    for one, other in (("scale", "shift"), ("weight", "bias")):
        if (given.get(one) is None) != (given.get(other) is None):
            raise ValueError(f"{op}: {one} and {other} go together, give both or neither")
    if given.get("scale") is not None and given.get("weight") is not None:
        raise ValueError(f"{op}: give scale and shift, or weight and bias, not both pairs")
    F = None
    for name, t in given.items():
        if t is None:
            continue
        if name in ("weight", "bias"):
            if t.shape != (D,):
                raise ValueError(f"{op}: {name} must be [D={D}], got {shape(t)}")
            continue
        if F is None and t.ndim == 3:
            F = t.shape[1]
        if t.shape != (B, F, D):
            raise ValueError(f"{op}: {name} must be [B={B}, F, D={D}] with one F for all tables, got {shape(t)}")
    return check_frames(op, L, F, tokens_per_frame, first_token)
