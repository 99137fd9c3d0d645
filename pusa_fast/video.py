"""Files <-> uint8 tensors, videos by PyAV, pictures by Pillow. Writes a file whole or not at all.

Shapes: T frames, H height, W width; frames are uint8 [T,H,W,3], RGB. A size is (width, height).
Reads any video that FFmpeg decodes, and folders of PNGs. Writes, by the path: `name.mp4` (H.264),
`name.gif`, and `name/` (or any existing folder): a PNG per frame, `0000.png` upwards.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import shutil
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pusa_fast.errors import ArgumentError

if TYPE_CHECKING:
    import av  # at run time only where a video is read or written

Array = NDArray[np.uint8]
PathLike = str | os.PathLike[str]

MAX_PIXELS = 89_478_485  # of one picture or frame: Pillow's own limit against decompression bombs
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_GIF_RATE = 50  # frames per second
FIT_MODES = ("crop", "pad", "stretch")
_SCALING = 0x4 | 0x40000 | 0x2000  # SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT
_TEXT = ("tty", "bin", "xbin", "adf", "idf")  # FFmpeg plays any text file as terminal art
# FFmpeg's codes for a file's colour matrix -> PyAV's names; for other codes the size decides.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
_TIME_BASE = 1_000_000  # FFmpeg's AV_TIME_BASE: a container's units of time in a second
_LIMITED_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG: luma from 16 to 235
_BT709 = 1  # the code of BT.709 for matrix, transfer and primaries alike
# What Pillow raises for a damaged file: its parsers let struct, zlib and lookup errors through.
_DAMAGED = (OSError, zlib.error, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, OverflowError)


@dataclass(frozen=True)
class VideoInfo:
    """`frames` in the file, average `fps`, `width` and `height` in pixels as displayed."""

    frames: int
    fps: float
    width: int
    height: int


def probe(path: PathLike) -> VideoInfo:
    """Size, rate and frame count, decoding one frame. ValueError or OSError names the file."""
    if os.path.isdir(path):
        pictures = _pictures(path)
        height, width, _ = read_image(pictures[0]).shape
        return VideoInfo(len(pictures), 0.0, width, height)
    with _opened(path) as (container, stream):
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise ValueError(f"{path} has no video frame that can be decoded: it is truncated or damaged")
        turned = first.rotation % 180 == 90
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        return VideoInfo(frames, float(stream.average_rate or 0), width, height)


def measure(path: PathLike, fps: float | None = None) -> VideoInfo:
    """As `probe`, but `frames` is counted by decoding to the end; raises as `iter_video`."""
    return replace(probe(path), frames=sum(1 for _ in lazy_frames(path, fps)))


def iter_video(path: PathLike, fps: float | None = None) -> Iterator[Array]:
    """Frames [H,W,3] one after another, rotated as the file's metadata says.

    `fps` resamples: frame k is the one nearest in time to k / fps. None gives every frame; a folder
    of PNGs has no times and gives every picture. Raises ValueError for a file that is not a video,
    is damaged, or ends early.
    """
    return (convert() for convert in lazy_frames(path, fps))


def lazy_frames(path: PathLike, fps: float | None = None) -> Iterator[Callable[[], Array]]:
    """As `iter_video`, but calls that return frames: a skipped one is decoded, not converted."""
    if os.path.isdir(path):
        return (partial(_read_array, picture) for picture in _pictures(path))
    timed = _decode(path)
    chosen = (frame for _, _, frame in timed) if fps is None else _resample(timed, rate_of(fps))
    return (partial(_upright, frame) for frame in chosen)


def read_video(
    path: PathLike, fps: float | None = None, max_frames: int | None = None, *, last_frames: int | None = None
) -> Tensor:
    """Frames as uint8 [T,H,W,3]: all, the first `max_frames` or the last `last_frames`.

    `fps`: see `iter_video`. Memory holds only the returned frames. Raises as `iter_video`, and
    ValueError if the frames differ in size.
    """
    frames = itertools.islice(lazy_frames(path, fps), max_frames)
    kept = [convert() for convert in (frames if last_frames is None else deque(frames, maxlen=last_frames))]
    if not kept:
        raise ValueError(f"{path} has no video frame: it is empty or damaged")
    sizes = {frame.shape for frame in kept}
    if len(sizes) > 1:
        raise ValueError(
            f"{path} holds frames of {len(sizes)} sizes, {sorted(sizes)[:2]} among them: convert it to one size"
        )
    return torch.from_numpy(np.stack(kept))


def _pictures(folder: PathLike) -> list[Path]:
    """The PNGs of a folder, sorted by the numbers in their names."""
    found = [
        entry for entry in Path(folder).iterdir() if entry.suffix.lower() == ".png" and not entry.name.startswith(".")
    ]
    if not found:
        raise ValueError(f"{folder} is a folder without PNG files: give a video file, or a folder of PNGs")
    # Every second part of the split is a number.
    return sorted(
        found, key=lambda entry: [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", entry.name))]
    )


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[Any, Any]]:
    """(container, video stream); FFmpeg's errors become ValueErrors that name the file."""
    import av

    with open(path, "rb") as file:  # raises the plain errors (missing, forbidden)
        if not (start := file.read(3)):
            raise ValueError(f"{path} is empty: give a video file")
        if start == b"GIF":  # the only format without a length in its header; it ends in a semicolon
            file.seek(max(0, os.path.getsize(path) - 64))
            if not file.read().rstrip(b"\0").endswith(b";"):
                raise ValueError(f"{path} ends early: it is truncated")
    try:
        # An absolute path is never a protocol ("a:b.mp4"); playlists must not reach the network.
        with av.open(os.path.abspath(path), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video or container.format.name in _TEXT:
                raise ValueError(f"{path} holds no video stream: give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(
                    f"{path} has frames of {stream.width}x{stream.height}, above {MAX_PIXELS} pixels: scale it down"
                )
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video ({error.strerror}): it is truncated, damaged or not a video"
        ) from None


def _decode(path: PathLike) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """(time, duration, frame), in seconds from the first frame. ValueError: the file ends early."""
    with _opened(path) as (container, stream):
        usual = 1 / Fraction(stream.average_rate or 25)
        start, end, count = None, Fraction(0), 0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"{path} is damaged at frame {count}: it is truncated, or was copied badly")
            time = end if frame.pts is None else frame.pts * Fraction(frame.time_base)
            start = time if start is None else start
            duration = frame.duration * Fraction(frame.time_base) if frame.duration else usual
            end, count = time + duration, count + 1
            yield time - start, duration, frame
        promised = _promised(container, stream, start or Fraction(0))
        if start is None or (promised is not None and end < promised - Fraction(3, 2) * usual):
            lasts = f"up to {float(end):.2f} of {float(promised or 0):.2f} s"
            raise ValueError(f"{path} ends early ({count} frames, {lasts}): it is truncated")


def _promised(container: Any, stream: Any, start: Fraction) -> Fraction | None:
    """The end of the video in seconds according to the header. A stream's length counts from its
    first frame, at `start`; Matroska's tag and the container's length count from 0."""
    if stream.duration is not None:
        return start + Fraction(stream.duration * stream.time_base)
    if tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3])
    alone = len(container.streams) == 1 and container.duration is not None
    return Fraction(container.duration, _TIME_BASE) if alone else None


def _upright(frame: av.VideoFrame) -> Array:
    """RGB [H,W,3] by the file's matrix (BT.709 if an HD file names none) and its quarter turns."""
    matrix = _MATRICES.get(frame.colorspace, "ITU709" if frame.height >= 720 else "ITU601")
    rgb = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation=_SCALING, threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)), dtype=np.uint8)


def _resample(timed: Iterator[tuple[Fraction, Fraction, av.VideoFrame]], fps: Fraction) -> Iterator[av.VideoFrame]:
    wanted = itertools.count()
    target = next(wanted) / fps
    held: tuple[Fraction, Fraction, av.VideoFrame] | None = None
    for time, duration, frame in timed:
        while held is not None and target <= (held[0] + time) / 2:
            yield held[2]
            target = next(wanted) / fps
        held = time, duration, frame
    # The last frame lasts until its end, less a quarter: rounded timestamps must not add a frame.
    while held is not None and target < held[0] + held[1] * Fraction(3, 4):
        yield held[2]
        target = next(wanted) / fps


def rate_of(fps: float) -> Fraction:
    """`fps` as a fraction; ValueError unless it is from 0.001 to 1000."""
    if not 0.001 <= fps <= 1000:  # NaN fails too
        raise ArgumentError("fps", f"={fps} must be at least 0.001 and at most 1000")
    return Fraction(fps).limit_denominator(10_000)


def read_image(path: PathLike) -> Tensor:
    """A picture as uint8 [H,W,3], rotated by its EXIF, converted as by `rgb_array`.

    ValueError: the file is not a picture, is damaged, or would unpack to more than MAX_PIXELS.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
        try:
            Image.init()  # without it Pillow knows only the formats used so far
            with Image.open(file, formats=[name for name in PICTURE_FORMATS if name in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                rgb = rgb_array(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{path} would unpack to more than {MAX_PIXELS} pixels ({error}): scale the picture down"
            ) from None
        except UnidentifiedImageError:
            raise ValueError(f"{path} is not a picture: give one of {', '.join(PICTURE_FORMATS)}") from None
        except _DAMAGED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} cannot be read as a picture ({reason}): it is truncated or damaged") from None
    return torch.from_numpy(rgb)


def _read_array(path: PathLike) -> Array:
    array: Array = read_image(path).numpy()
    return array


def rgb_array(image: Image.Image) -> Array:
    """8-bit RGB [H,W,3]: transparency on black, 16 bits reduced to 8. ValueError: float pixels."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion clips them at 255
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return np.array(image.convert("RGB"))


def fit(frames: Tensor, size: tuple[int, int], mode: str = "crop") -> Tensor:
    """uint8 [T,H,W,3] or [H,W,3] resized to `size` = (width, height) with a Lanczos filter.

    crop: fill the size, cut both sides equally; pad: keep everything, add black bars; stretch:
    change the aspect. Frames of that size are returned as they are. ValueError: another mode.
    """
    if mode not in FIT_MODES:
        raise ValueError(f"fit={mode!r} is unknown: use {', '.join(FIT_MODES)}")
    if tuple(frames.shape[-3:-1]) == (size[1], size[0]):
        return frames
    clip = frames.cpu().numpy()
    fitted = [_fit_one(Image.fromarray(frame), size, mode) for frame in clip.reshape(-1, *clip.shape[-3:])]
    return torch.from_numpy(np.stack(fitted).reshape(*clip.shape[:-3], size[1], size[0], 3))


def _fit_one(image: Image.Image, size: tuple[int, int], mode: str) -> Array:
    """crop scales by the larger ratio and cuts in the source (exact centre); pad by the smaller."""
    ratios = (size[0] / image.width, size[1] / image.height)
    box = (0.0, 0.0, float(image.width), float(image.height))
    inner = size
    if mode == "crop":
        width, height = (side / max(ratios) for side in size)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (max(left, 0.0), max(top, 0.0), min(left + width, box[2]), min(top + height, box[3]))
    elif mode == "pad":
        inner = (max(1, round(image.width * min(ratios))), max(1, round(image.height * min(ratios))))
    scaled = image.resize(inner, Image.Resampling.LANCZOS, box=box)
    if inner == size:
        return np.array(scaled)
    canvas = Image.new("RGB", size)
    canvas.paste(scaled, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return np.array(canvas)


def contact_sheet(frames: Tensor, longest: int = 1600) -> Image.Image:
    """n x n frames of the clip [T,H,W,3], evenly spread, in reading order; n at most 4.

    Equal rows and columns keep the clip's aspect. Small sheets are enlarged by whole pixels to
    about 512, large ones reduced to `longest` pixels.
    """
    count, height, width, _ = frames.shape
    side = min(4, int(count**0.5))
    spread = torch.linspace(0, count - 1, side * side).round().long() if side > 1 else torch.zeros(1, dtype=torch.long)
    tiles = frames[spread].reshape(side, side, height, width, 3).permute(0, 2, 1, 3, 4)
    sheet = Image.fromarray(tiles.reshape(side * height, side * width, 3).cpu().numpy())
    larger = max(sheet.size)
    if larger < 512:
        return sheet.resize((sheet.width * (512 // larger), sheet.height * (512 // larger)), Image.Resampling.NEAREST)
    if larger > longest:
        size = (max(1, sheet.width * longest // larger), max(1, sheet.height * longest // larger))
        return sheet.resize(size, Image.Resampling.LANCZOS)
    return sheet


def check_target(path: PathLike, fps: float) -> None:
    """ValueError: no format for this path or rate; a folder with more than numbered PNGs in it."""
    rate = rate_of(fps)
    if _is_folder(path):
        file = os.fspath(path).rstrip("/" + os.sep)
        if os.path.lexists(file) and not os.path.isdir(file):
            raise ValueError(f"{path} means a folder of PNGs, but {file} is a file: choose another name")
        names = os.listdir(path) if os.path.isdir(path) else []
        if kept := [name for name in names if not re.fullmatch(r"\d+\.png", name)]:
            raise ValueError(
                f"{path} holds {kept[0]}, not numbered PNGs only, and would be replaced: choose another folder"
            )
    elif os.path.splitext(path)[1].lower() not in _WRITERS:
        raise ValueError(f"{path} cannot be written: end it in {', '.join(_WRITERS)}, or in / for a folder of PNGs")
    elif os.path.isdir(path):
        raise ValueError(f"{path} is a folder: choose another name, or end it in / for a folder of PNGs")
    elif os.path.splitext(path)[1].lower() == ".gif" and rate > _GIF_RATE:
        raise ValueError(
            f"{path}: a GIF plays at most {_GIF_RATE} frames per second, got {float(rate):g}: lower the rate"
        )


def write_video(path: PathLike, frames: Tensor | Iterable[Array | Tensor], fps: float) -> None:
    """Write uint8 frames [H,W,3] of one size, replacing `path`, which chooses the format.

    An iterable is written as it comes (a GIF needs all frames for its palette). Equal frames give
    equal bytes on any number of cores. Raises ValueError for a format, rate or size that cannot be
    written, OSError for a full or forbidden disk.
    """
    with staged(path) as temporary:
        encode_video(temporary, path, frames, fps)


def encode_video(temporary: Path, path: PathLike, frames: Tensor | Iterable[Array | Tensor], fps: float) -> None:
    """As `write_video`, in `path`'s format but named `temporary`, which the caller renames."""
    check_target(path, fps)
    rate = rate_of(fps)
    arrays = (frame.cpu().numpy() if isinstance(frame, Tensor) else frame for frame in frames)
    first = next(arrays, None)
    if first is None:
        raise ValueError(f"{path}: there are no frames to write")
    write = _write_pngs if _is_folder(path) else _WRITERS[os.path.splitext(path)[1].lower()]
    try:
        write(temporary, itertools.chain([first], arrays), rate)
    except OSError as error:
        if error.filename == os.fspath(temporary):
            error.filename = os.fspath(path)
        raise


@contextmanager
def staged(path: PathLike) -> Iterator[Path]:
    """A temporary name in `path`'s folder: moved to `path` if the block succeeds, else removed."""
    target = Path(os.path.abspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist", str(target.parent))
    temporary = target.with_name(f".pusa-fast-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _move(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, target: Path) -> None:
    """Replace `target`. os.replace only replaces empty folders: a full one is moved aside first."""
    aside = temporary.with_suffix(".old") if temporary.is_dir() and target.is_dir() else None
    try:
        if aside is not None:
            os.replace(target, aside)
        os.replace(temporary, target)
    except OSError as error:
        if aside is not None and aside.exists() and not target.exists():
            os.replace(aside, target)
        raise type(error)(error.errno, error.strerror, str(target)) from None
    if aside is not None:
        shutil.rmtree(aside)


def _is_folder(path: PathLike) -> bool:
    return os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path)


@contextmanager
def _new_mp4(path: Path) -> Iterator[Any]:
    """A container to write into. FFmpeg's errors become OSErrors with the same code: the disk is
    full, or forbidden."""
    import av

    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            yield container
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_mp4(path: Path, frames: Iterator[Array], rate: Fraction) -> None:
    import av

    with _new_mp4(path) as container:
        stream: Any = None
        for array in frames:
            if stream is None:
                height, width, _ = array.shape
                if height % 2 or width % 2:
                    raise ValueError(
                        f"{width}x{height}: H.264 needs an even width and height, write a GIF or PNGs instead"
                    )
                stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "fast"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                coding = stream.codec_context
                coding.thread_count = 4  # x264's output depends on it: the same on every machine
                coding.colorspace = coding.color_primaries = coding.color_trc = _BT709
                coding.color_range = _LIMITED_RANGE
            elif array.shape != (stream.height, stream.width, 3):
                raise ValueError(
                    f"a frame of {array.shape[1]}x{array.shape[0]} in a video of {stream.width}x{stream.height}"
                )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range=_LIMITED_RANGE,
                interpolation=_SCALING,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: Iterator[Array], rate: Fraction) -> None:
    """One palette, so that still areas do not flicker; delays of n/100 s add up to the rate."""
    clip = np.stack(list(frames))
    sample = clip[np.linspace(0, len(clip) - 1, min(16, len(clip))).round().astype(int)]
    palette = Image.fromarray(sample.reshape(-1, clip.shape[2], 3)).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in clip]
    ends = [round(100 * (index + 1) / rate) for index in range(len(clip))]
    delays = [10 * (end - start) for start, end in itertools.pairwise([0, *ends])]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=delays, loop=0, optimize=False)


def _write_pngs(path: Path, frames: Iterator[Array], _: Fraction) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index:04d}.png")


_WRITERS: Mapping[str, Callable[[Path, Iterator[Array], Fraction], None]] = MappingProxyType(
    {".mp4": _write_mp4, ".gif": _write_gif}
)
