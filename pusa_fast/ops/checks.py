"""What is wrong with an op's arguments, said with the value and what it should be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Named = Mapping[str, Tensor | None]


def shape(x: Tensor | None) -> list[int] | None:
    return None if x is None else list(x.shape)


def require(condition: bool, op: str, message: str, got: Tensor | None) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}, got {shape(got)}")


def check_float(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be a float tensor, got {x.dtype}")


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor lies where x does. Raises ValueError naming the one that does not."""
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, but the op runs on {x.device}: move it there")


def check_residual(op: str, x: Tensor, y: Tensor | None, tables: Named, bases: Named, affine: Named) -> None:
    """Arguments of residual_norm and gated_residual; see there. Raises ValueError."""
    require(x.ndim == 3, op, "x must be [B, L, D]", x)
    check_float(op, x=x, y=y, **tables, **bases, **affine)
    check_device(op, x, y=y, **tables, **bases, **affine)
    B, L, D = x.shape
    require(y is None or y.shape == x.shape, op, f"y must have x's shape {shape(x)}", y)
    given = {name for name in tables if tables[name] is not None or bases[f"{name}_base"] is not None}
    if "gate" in given and y is None:
        raise ValueError(f"{op}: gate given without y: there is nothing to gate")
    if len(given & {"scale", "shift"}) == 1:
        raise ValueError(f"{op}: scale and shift go together, give both or neither")
    if "scale" in tables and ((tables["scale"] is None) != (tables["shift"] is None)):
        raise ValueError(f"{op}: scale and shift are both frame tables or neither is: one has only its base row")
    rows = {name for name in affine if affine[name] is not None}
    if len(rows) == 1:
        raise ValueError(f"{op}: weight and bias go together, give both or neither")
    if rows and "scale" in given:
        raise ValueError(f"{op}: give scale and shift, or weight and bias, not both pairs")
    frames = {t.shape[1] for t in tables.values() if t is not None and t.ndim == 3}
    for name, table in tables.items():
        fits = table is None or (table.ndim == 3 and (table.shape[0], table.shape[2]) == (B, D) and len(frames) == 1)
        require(fits, op, f"{name} must be [B={B}, F, D={D}] with one F for all tables", table)
    for F in frames:
        if F <= 0 or L % F:
            raise ValueError(f"{op}: {L} tokens do not divide into {F} frames")
    for name, row in {**bases, **affine}.items():
        require(row is None or row.shape == (D,), op, f"{name} must be [D={D}]", row)
