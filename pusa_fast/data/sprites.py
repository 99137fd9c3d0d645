"""Procedural clips with captions: one moving shape on a background; and an oracle to measure clips.

Everything is drawn from a small grammar with a seeded generator, so the data is unlimited and a
result can be scored exactly: colour and shape by segmentation, motion by the track of the centroid.
Frames are uint8 [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS = {
    "red": (215, 40, 40), "green": (45, 185, 70), "blue": (50, 85, 225),
    "yellow": (240, 210, 45), "purple": (165, 60, 200), "cyan": (60, 200, 215),
}  # fmt: skip
BACKGROUNDS = {"black": (18, 18, 20), "gray": (118, 118, 118), "white": (236, 236, 232), "brown": (96, 66, 44)}
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels per frame
SIZES = {"small": 9.0, "large": 12.0}  # radius of the circle of equal area, pixels
# Reach of each shape from its centroid in radii: sideways, up, down.
SHAPES = {
    "circle": (1.0, 1.0, 1.0), "square": (0.886, 0.886, 0.886),
    "triangle": (1.347, 1.555, 0.778), "cross": (1.189, 1.189, 1.189),
}  # fmt: skip

GRAMMAR: tuple[Mapping[str, object], ...] = (SHAPES, COLORS, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)

FRAMES, SIZE = 17, 64
_FOREGROUND_DISTANCE = 55.0  # RGB distance from the background above which a pixel belongs to the shape


@dataclass(frozen=True)
class Scene:
    """A clip's contents. `x`, `y`: first centroid, in pixels; `tint`, `tilt`: of the background."""

    shape: str
    color: str
    size: str
    direction: str
    speed: str
    background: str
    x: float
    y: float
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tilt: tuple[float, float] = (0.0, 0.0)

    def centers(self, frames: int = FRAMES) -> Tensor:
        """True centroids [frames, 2] (x, y) in pixels."""
        step = torch.tensor(DIRECTIONS[self.direction]) * SPEEDS[self.speed]
        return torch.tensor([self.x, self.y]) + torch.arange(frames)[:, None] * step


def is_held_out(color: str, shape: str, direction: str) -> bool:
    """13 of the 96 combinations of colour, shape and direction are never trained on."""
    c, s, d = (list(t).index(k) for t, k in ((COLORS, color), (SHAPES, shape), (DIRECTIONS, direction)))
    return (c + 3 * s + 5 * d) % 8 == 0


def draw_scene(
    generator: torch.Generator, held_out: bool | None = False, frames: int = FRAMES, size: int = SIZE
) -> Scene:
    """A random scene whose shape stays in the picture. `held_out`: the split; None: of both."""
    while True:
        shape, color, big, direction, speed, background = (_pick(table, generator) for table in GRAMMAR)
        if held_out is None or is_held_out(color, shape, direction) == held_out:
            break
    side, up, down = (reach * SIZES[big] + 1 for reach in SHAPES[shape])
    dx, dy = (a * SPEEDS[speed] * (frames - 1) for a in DIRECTIONS[direction])
    x = _uniform(max(side, side - dx), min(size - side, size - side - dx), generator)
    y = _uniform(max(up, up - dy), min(size - down, size - down - dy), generator)
    tint = tuple(_uniform(-14, 14, generator) for _ in range(3))
    tilt = (_uniform(-12, 12, generator), _uniform(-12, 12, generator))
    return Scene(shape, color, big, direction, speed, background, x, y, (tint[0], tint[1], tint[2]), tilt)


def caption(scene: Scene, generator: torch.Generator | None = None, background: str | None = None) -> str:
    """A caption. With a generator the wording varies, and size, speed or background may be missing.

    `background`: another name for it.
    """
    size, speed, place = f"{scene.size} ", f" {scene.speed}", f" on a {background or scene.background} background"
    verb, way = "moves", scene.direction
    if generator is not None:
        verb = ("moves", "moves", "slides", "is moving")[_below(4, generator)]
        to_side = scene.direction in ("left", "right") and _below(3, generator) == 0
        way = f"to the {scene.direction}" if to_side else scene.direction
        size, speed, place = (part if _below(4, generator) else "" for part in (size, speed, place))
    return f"a {size}{scene.color} {scene.shape} {verb} {way}{speed}{place}"


def render(
    scenes: Sequence[Scene], frames: int = FRAMES, size: int = SIZE, backdrops: Mapping[int, Tensor] | None = None
) -> Tensor:
    """uint8 [N, frames, size, size, 3], anti-aliased. `backdrops` [size, size, 3] by scene."""
    centers = torch.stack([s.centers(frames) for s in scenes])  # [N, T, 2]
    radius = torch.tensor([SIZES[s.size] for s in scenes])[:, None, None, None]
    axis = torch.arange(size) + 0.5
    dx = axis[None, None, None, :] - centers[..., 0, None, None]
    dy = axis[None, None, :, None] - centers[..., 1, None, None]
    inside = torch.empty(len(scenes), frames, size, size)
    for name in SHAPES:
        rows = [i for i, s in enumerate(scenes) if s.shape == name]
        if rows:
            inside[rows] = _signed_distance(name, dx[rows], dy[rows], radius[rows])
    alpha = (inside + 0.5).clamp(0, 1)[..., None]
    color = torch.tensor([COLORS[s.color] for s in scenes], dtype=torch.float32)[:, None, None, None]
    background = _background(scenes, size)
    for index, picture in (backdrops or {}).items():
        background[index] = picture
    clip = alpha * color + (1 - alpha) * background[:, None]
    return clip.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Track:
    """What the oracle sees in a clip of T frames."""

    centers: Tensor  # [T, 2] centroid (x, y) in pixels, NaN where no shape is seen
    colors: tuple[str | None, ...]  # per frame, nearest colour of the palette
    shapes: tuple[str | None, ...]  # per frame, best-fitting outline
    areas: Tensor  # [T] pixels

    @property
    def direction(self) -> str | None:
        """Main direction of the motion between the first and last frame that show the shape."""
        seen = self.centers[~self.centers.isnan().any(dim=1)]
        if len(seen) < 2 or (seen[-1] - seen[0]).norm() < 3:
            return None
        move = seen[-1] - seen[0]
        return max(DIRECTIONS, key=lambda d: float(move @ torch.tensor(DIRECTIONS[d])))


def measure(clip: Tensor) -> Track:
    """Segment a clip uint8 [T, H, W, 3] by distance from the border's colour; name its shape."""
    centers: list[Tensor] = []
    colors: list[str | None] = []
    shapes: list[str | None] = []
    areas: list[int] = []
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    H, W = clip.shape[1:3]
    ys, xs = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    for frame in clip.float():
        border = torch.cat([edge.flatten(0, 1) for edge in (frame[:2], frame[-2:], frame[:, :2], frame[:, -2:])])
        distance = (frame - border.median(dim=0).values).norm(dim=-1)
        mask = distance > _FOREGROUND_DISTANCE
        area = int(mask.sum())
        areas.append(area)
        if area < 20:
            centers.append(torch.full((2,), torch.nan))
            colors.append(None)
            shapes.append(None)
            continue
        weight = (distance * mask)[..., None]
        center = torch.stack([(xs * weight[..., 0]).sum(), (ys * weight[..., 0]).sum()]) / weight.sum()
        centers.append(center)
        core = frame[distance > 0.6 * distance[mask].quantile(0.9)].mean(dim=0)
        colors.append(list(COLORS)[int((palette - core).norm(dim=1).argmin())])
        shapes.append(_name_shape(mask, xs - center[0], ys - center[1], area))
    return Track(torch.stack(centers), tuple(colors), tuple(shapes), torch.tensor(areas))


def _name_shape(mask: Tensor, dx: Tensor, dy: Tensor, area: int) -> str:
    radius = torch.tensor((area / torch.pi) ** 0.5)
    overlap = {}
    for name in SHAPES:
        outline = _signed_distance(name, dx, dy, radius) > 0
        overlap[name] = float((outline & mask).sum() / (outline | mask).sum())
    return max(overlap, key=lambda k: overlap[k])


def _signed_distance(shape: str, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Pixels to the outline, positive inside; the area is that of the circle of radius r."""
    if shape == "circle":
        return r - (dx**2 + dy**2).sqrt()
    if shape == "square":
        return 0.886 * r - torch.maximum(dx.abs(), dy.abs())
    if shape == "triangle":
        slanted = 0.778 * r - (0.866 * dx.abs() - 0.5 * dy)
        return torch.minimum(0.778 * r - dy, slanted)
    long, thin = 1.189 * r, 0.396 * r
    bars = [torch.minimum(a - dx.abs(), b - dy.abs()) for a, b in ((long, thin), (thin, long))]
    return torch.maximum(bars[0], bars[1])


def _background(scenes: Sequence[Scene], size: int) -> Tensor:
    base = torch.tensor([[c + t for c, t in zip(BACKGROUNDS[s.background], s.tint, strict=True)] for s in scenes])
    tilt = torch.tensor([s.tilt for s in scenes])
    ramp = torch.linspace(-1, 1, size)
    slope = tilt[:, 0, None, None] * ramp[None, None, :] + tilt[:, 1, None, None] * ramp[None, :, None]
    return (base[:, None, None, :] + slope[..., None]).clamp(0, 255)


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _pick(table: Mapping[str, object], generator: torch.Generator) -> str:
    return list(table)[_below(len(table), generator)]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
