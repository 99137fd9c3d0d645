"""Files <-> frames: round trips, resampling, damaged files, and nothing half-written."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pusa_fast import video

COLOURS = ((230, 40, 40), (40, 200, 60), (40, 80, 220), (240, 220, 40))


def moving_square(count: int = 17, width: int = 64, height: int = 48) -> Tensor:
    """uint8 [T,H,W,3]: a square that moves one pixel a frame and changes colour every fourth."""
    frames = torch.full((count, height, width, 3), 50, dtype=torch.uint8)
    for index in range(count):
        frames[index, 8:32, 4 + index : 28 + index] = torch.tensor(COLOURS[index // 4 % 4], dtype=torch.uint8)
    return frames


def centre_error(a: Tensor, b: Tensor) -> float:
    """Largest difference at the middle of the square, where chroma subsampling does not reach."""
    return max((a[i, 20, 16 + i].int() - b[i, 20, 16 + i].int()).abs().max().item() for i in range(len(b)))


def write_webm(path: Path, frames: Tensor, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("name", "tolerance"), [("clip.mp4", 6), ("clip.gif", 2), ("clip/", 0)])
def test_written_frames_come_back(tmp_path: Path, name: str, tolerance: int) -> None:
    frames = moving_square()
    path = f"{tmp_path}/{name}"
    video.write_video(path, frames, fps=8)
    again = video.read_video(path)
    assert again.dtype == torch.uint8
    assert again.shape == frames.shape
    assert centre_error(again, frames) <= tolerance
    info = video.probe(path)
    assert (info.frames, info.width, info.height) == (17, 64, 48)
    assert [entry.name for entry in tmp_path.iterdir()] == [name.rstrip("/")]


def test_mp4_is_deterministic_and_takes_an_iterable(tmp_path: Path) -> None:
    frames = moving_square()
    video.write_video(tmp_path / "a.mp4", frames, fps=16)
    video.write_video(tmp_path / "b.mp4", iter(frames), fps=16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)


def test_webm_is_read(tmp_path: Path) -> None:
    frames = moving_square(50)[:, :, :64]
    write_webm(tmp_path / "clip.webm", frames, 25)
    assert video.probe(tmp_path / "clip.webm") == video.VideoInfo(50, 25.0, 64, 48)
    assert video.read_video(tmp_path / "clip.webm").shape == frames.shape


@pytest.mark.parametrize(("fps", "count"), [(8, 16), (16, 32), (12, 24), (4, 8), (24, 48)])
def test_resampling_takes_the_frame_nearest_in_time(tmp_path: Path, fps: int, count: int) -> None:
    frames = moving_square(32)
    video.write_video(tmp_path / "clip.mp4", frames, fps=16)
    taken = video.read_video(tmp_path / "clip.mp4", fps=fps)
    whole = video.read_video(tmp_path / "clip.mp4")
    assert len(taken) == count
    for k in range(count):
        distance = [abs(Fraction(k, fps) - Fraction(i, 16)) for i in range(32)]
        nearest = [i for i in range(32) if distance[i] == min(distance)]
        assert any(torch.equal(taken[k], whole[i]) for i in nearest)


def test_gif_keeps_its_rate_though_delays_are_hundredths(tmp_path: Path) -> None:
    video.write_video(tmp_path / "clip.gif", moving_square(16), fps=8)  # 12.5 hundredths a frame
    assert len(video.read_video(tmp_path / "clip.gif", fps=8)) == 16
    assert len(video.read_video(tmp_path / "clip.gif", fps=4)) == 8
    with pytest.raises(ValueError, match=r"fast\.gif: .*60"):
        video.write_video(tmp_path / "fast.gif", moving_square(4), fps=60)


def test_first_and_last_frames(tmp_path: Path) -> None:
    video.write_video(f"{tmp_path}/clip/", moving_square(17), fps=8)
    assert torch.equal(video.read_video(tmp_path / "clip", max_frames=5), moving_square(17)[:5])
    assert torch.equal(video.read_video(tmp_path / "clip", last_frames=5), moving_square(17)[-5:])


def test_rotation_of_a_phone_is_honoured(tmp_path: Path) -> None:
    clip = torch.zeros(4, 32, 64, 3, dtype=torch.uint8)
    clip[:, :16, :32] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    video.write_video(tmp_path / "clip.mp4", clip, fps=8)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # version-0 track header: the display matrix, here for a quarter turn clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    turned = video.read_video(tmp_path / "phone.mp4")
    assert turned.shape == (4, 64, 32, 3)
    assert video.probe(tmp_path / "phone.mp4").width == 32
    assert turned[0, 8, 24, 0] > 200  # what was top left is top right
    assert turned[0, 8, 8, 0] < 50


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webm"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated_videos_are_refused(tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    frames = moving_square(50)
    write_webm(path, frames, 25) if name.endswith("webm") else video.write_video(path, frames, fps=8)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"clip\.\w+ .*truncated"):
        video.read_video(path)


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 100, bytes(1000), b"GIF89a", os.urandom(3000)])
def test_files_that_are_no_video_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.mp4") as caught:
        video.read_video(tmp_path / "clip.mp4")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        video.read_video(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError):
        video.read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="folder without PNG"):
        video.read_video(tmp_path)


def test_an_odd_name_is_a_file_name(tmp_path: Path) -> None:
    video.write_video(tmp_path / "concat:a%03d.mp4", moving_square(5), fps=8)
    assert len(video.read_video(tmp_path / "concat:a%03d.mp4")) == 5


def test_exif_rotation(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    image.putpixel((0, 0), (255, 0, 0))
    image.save(tmp_path / "phone.png", exif=exif)
    turned = video.read_image(tmp_path / "phone.png")
    assert turned.shape == (40, 20, 3)
    assert turned[0, 19].tolist() == [255, 0, 0]


def test_transparency_is_composited_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 100, 50, 128)).save(tmp_path / "rgba.png")
    assert video.read_image(tmp_path / "rgba.png")[0, 0].tolist() == [100, 50, 25]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    assert video.read_image(tmp_path / "p.png")[0, 0].tolist() == [10, 20, 30]
    assert video.read_image(tmp_path / "clear.png")[0, 0].tolist() == [0, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert video.read_image(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 3)).save(path)
    assert video.read_image(path).shape == (3, 5, 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"bomb\.png would unpack to more than"):
        video.read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("damage", ["half", "text", "header", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_damaged_pictures_are_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(
        {"half": data[: len(data) // 2], "text": b"not a picture", "header": data[:20], "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=rf"x\.{suffix}") as caught:
        video.read_image(path)
    assert "\n" not in str(caught.value)


def test_fit() -> None:
    wide = torch.zeros(2, 32, 96, 3, dtype=torch.uint8)
    wide[:, :, 32:64] = 255  # white middle third
    crop, pad, stretch = (video.fit(wide, (32, 32), mode) for mode in video.FIT_MODES)
    assert crop.shape == pad.shape == stretch.shape == (2, 32, 32, 3)
    assert crop.min() == 255
    assert pad[0, :10].max() == 0
    assert pad[0, 16, 16].min() > 240
    assert pad[0, 16, 2].max() < 20
    assert stretch[0, 0, 16].min() > 240
    assert stretch[0, 0, 2].max() < 20
    assert video.fit(wide, (96, 32)) is wide
    assert video.fit(wide[0], (17, 31), "pad").shape == (31, 17, 3)
    with pytest.raises(ValueError, match="fit='zoom'"):
        video.fit(wide, (32, 32), "zoom")


@pytest.mark.parametrize(("count", "side"), [(1, 1), (3, 1), (5, 2), (13, 3), (17, 4), (81, 4)])
def test_contact_sheet_has_the_clips_aspect(count: int, side: int) -> None:
    frames = moving_square(count, width=96, height=48)
    sheet = video.contact_sheet(frames)
    assert sheet.width == 2 * sheet.height
    tile = sheet.width // side
    first = np.asarray(sheet.crop((0, 0, tile, tile // 2)).resize((96, 48), Image.Resampling.NEAREST))
    assert np.array_equal(first, frames[0].numpy())
    if side > 1:
        last = sheet.crop((sheet.width - tile, sheet.height - tile // 2, sheet.width, sheet.height))
        assert np.array_equal(np.asarray(last.resize((96, 48), Image.Resampling.NEAREST)), frames[-1].numpy())
    assert max(video.contact_sheet(moving_square(4, 1280, 720)).size) == 1600


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def broken() -> object:
        yield from moving_square(3).numpy()
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("clip.mp4", "clip.gif", "clip/"):
        with pytest.raises(OSError, match="No space left"):
            video.write_video(f"{tmp_path}/{name}", broken(), fps=8)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_temporary_file_is_removed(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "clip.json").write_text("old")
    with pytest.raises(type(error)), video.staged(tmp_path / "clip.json") as temporary:
        temporary.write_text("half")
        raise error
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("clip.json", "old")]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"old")
    mixed = [moving_square(1)[0], moving_square(1, 32, 32)[0]]
    with pytest.raises(ValueError, match="32x32 in a video of 64x48"):
        video.write_video(tmp_path / "clip.mp4", mixed, fps=8)
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("clip.avi", moving_square(2), 8, r"clip\.avi cannot be written: end it in \.mp4, \.gif"),
        ("clip", moving_square(2), 8, "cannot be written"),
        ("clip.mp4", moving_square(2), 0, "fps=0"),
        ("clip.mp4", moving_square(2), float("nan"), "fps=nan"),
        ("clip.mp4", moving_square(2, 33, 32), 8, "33x32: H.264 needs"),
        ("clip.mp4", moving_square(0), 8, "no frames"),
        ("none/clip.mp4", moving_square(2), 8, "folder to write into does not exist"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, frames: Tensor, fps: float, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        video.write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_frames_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    video.write_video(f"{folder}/", moving_square(9), fps=8)
    video.write_video(folder, moving_square(5), fps=8)
    assert sorted(entry.name for entry in folder.iterdir()) == [f"{index:04d}.png" for index in range(5)]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        video.write_video(folder, moving_square(5), fps=8)
    assert len(list(folder.iterdir())) == 6
