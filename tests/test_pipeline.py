"""The one-call API, on a tiny random model in each of the layouts that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pusa_fast import Condition, Pipeline, Tiling, VAEConfig, WanDiT, WanVAE
from pusa_fast import pipeline as pipeline_module
from pusa_fast.device import weight_bytes
from pusa_fast.media import open_media
from pusa_fast.model.vae.memory import peak_bytes
from pusa_fast.sampling.sampler import ExpertPair
from pusa_fast.weights.pretrained import WAN_DEFAULTS
from tiny_pipeline import DEFAULTS, write_model


@pytest.fixture(scope="module")
def nano_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(nano_like: Path) -> Pipeline:
    return Pipeline.from_pretrained(nano_like, device="cpu")


def picture(value: int = 200, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, (value, 20, 40))


def test_text_to_video_with_the_models_own_defaults(pipe: Pipeline) -> None:
    frames = pipe("a red circle")
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == torch.uint8 and frames.device.type == "cpu"
    run = pipe.last_run
    assert set(run["seconds"]) == {"text", "encode", "denoise", "decode"} and min(run["seconds"].values()) >= 0
    assert (run["task"], run["guidance_mode"], run["tokens"], run["shape"]) == (
        "text-to-video",
        "batch",
        12,
        [1, 4, 2, 4, 6],
    )
    assert (run["steps"], run["shift"], run["guidance_scale"], run["seed"], run["compat"]) == (
        2,
        3.0,
        3.0,
        0,
        "reference",
    )
    assert run["tiling"] is None


def test_equal_settings_give_equal_frames(pipe: Pipeline) -> None:
    first = pipe("a red circle", seed=1)
    assert torch.equal(first, pipe("  a  red circle", seed=1))
    assert not torch.equal(first, pipe("a red circle", seed=2))
    assert not torch.equal(first, pipe("a blue square", seed=1))


def test_latents(pipe: Pipeline) -> None:
    latents = pipe("a red circle", output="latents")
    assert (
        latents.shape == (1, 4, 2, 4, 6) and latents.dtype == torch.float32 and "decode" not in pipe.last_run["seconds"]
    )
    again = pipe("a red circle", output="latents", guidance_scale=1)
    assert pipe.last_run["guidance_mode"] == "off" and not torch.equal(latents, again)


def test_exact_compat_rounds(pipe: Pipeline) -> None:
    latents = pipe("a red circle", compat="exact", output="latents")
    frames = pipe("a red circle", compat="exact")
    video = pipe.vae.decode(latents)[0].permute(1, 2, 3, 0)
    assert torch.equal(frames, ((video + 1) * 127.5).round().to(torch.uint8))


def test_compat_reaches_the_schedule(pipe: Pipeline) -> None:
    """Three steps with shift 3 pass through timestep 857.14, which the reference truncates."""
    exact, reference = (pipe("a red circle", steps=3, compat=c, output="latents") for c in ("exact", "reference"))
    assert not torch.equal(exact, reference)


def test_embeds_are_used_as_given(pipe: Pipeline) -> None:
    assert pipe.text_encoder is not None
    rows = pipe.text_encoder.encode(["a red circle", "blue"])
    by_text = pipe("a red circle", output="latents")
    assert torch.equal(pipe(prompt_embeds=rows[:1], negative_prompt_embeds=rows[1], output="latents"), by_text)
    assert torch.equal(pipe(prompt_embeds=rows[0], negative_prompt="blue", output="latents"), by_text)
    assert torch.equal(pipe(prompt_embeds=rows[0], output="latents"), by_text), "the default negative prompt is blue"
    short = pipe(prompt_embeds=rows[0, :3], output="latents")
    assert pipe.last_run["guidance_mode"] == "two-pass" and not torch.equal(short, by_text)


def test_negatives_are_ignored_without_guidance(pipe: Pipeline) -> None:
    plain = pipe("a red circle", guidance_scale=1.0)
    nonsense = {"negative_prompt": "left", "negative_prompt_embeds": torch.zeros(2, 3)}
    assert torch.equal(plain, pipe("a red circle", guidance_scale=1.0, **nonsense))


def test_empty_prompt(pipe: Pipeline) -> None:
    assert pipe("").shape == (5, 32, 48, 3)


def test_a_clean_first_frame_is_kept(pipe: Pipeline) -> None:
    latents = pipe("a red circle", conditions=[Condition(picture())], output="latents")
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None].float() * (2 / 255) - 1
    assert torch.equal(latents[:, :, :1], pipe.vae.encode(pixels))
    assert pipe.last_run["task"] == "image-to-video"


def every_form(tmp_path: Path) -> dict[str, object]:
    array = np.array(picture())
    array.setflags(write=False)
    path = tmp_path / "first.png"
    picture().save(path)
    return {
        "PIL": picture(),
        "str": str(path),
        "path": path,
        "array": array,
        "tensor": torch.from_numpy(array.copy()),
        "backwards": np.ascontiguousarray(array[::-1])[::-1],
        "clip": array[None],
        "list": [picture()],
        "tuple": (picture(), picture(3)),
        "transparent": Image.merge("RGBA", [*picture().split(), Image.new("L", (48, 32), 255)]),
    }


def test_every_form_of_media_gives_the_same(pipe: Pipeline, tmp_path: Path) -> None:
    given = {name: pipe("a", conditions=[Condition(m)], output="latents") for name, m in every_form(tmp_path).items()}
    assert [name for name, latents in given.items() if not torch.equal(latents, given["PIL"])] == []


def test_a_clip_on_disk_is_read_as_it_is(pipe: Pipeline, tmp_path: Path) -> None:
    from pusa_fast import video

    clip = torch.randint(0, 255, (9, 32, 48, 3), dtype=torch.uint8)
    (tmp_path / "clip").mkdir()
    video.write_video(tmp_path / "clip", clip, 8)
    conditions = [Condition(tmp_path / "clip", slice(0, 2))]
    from_folder = pipe("a", conditions=conditions, num_frames=9, output="latents")
    assert pipe.last_run["task"] == "extension"
    assert torch.equal(from_folder, pipe("a", conditions=[Condition(clip, [0, 1])], num_frames=9, output="latents"))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_media_of_another_size_are_fitted(pipe: Pipeline, fit: str) -> None:
    from pusa_fast import video

    large = torch.randint(0, 255, (100, 90, 3), dtype=torch.uint8)
    fitted = video.fit(large, (48, 32), fit)
    got, wanted = (pipe("a", conditions=[Condition(m)], fit=fit, output="latents") for m in (large, fitted))
    assert torch.equal(got, wanted)


def test_tiling_reaches_both_ends_of_the_vae(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    for name in ("encode", "decode_frames"):
        method = getattr(pipe.vae, name)
        monkeypatch.setattr(
            pipe.vae, name, lambda x, tiling=None, m=method, **k: seen.append(tiling) or m(x, tiling, **k)
        )
    for tiling in (Tiling(tile=(4, 4), stride=(2, 2)), Tiling(tile=(4, 4), mode="exact")):
        seen.clear()
        pipe("a", conditions=[Condition(picture())], tiling=tiling)
        assert seen == [tiling, tiling] and pipe.last_run["tiling"] == tiling
        assert pipe.last_run["overcompute"] > 1


def test_auto_tiling_counts_with_the_weights_of_all_parts(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole where the decoder's peak fits beside every part's weights; tiles below; an error before
    anything runs."""
    assert pipe.text_encoder is not None
    parts = (pipe.dit, pipe.vae, pipe.text_encoder.model)
    weights = weight_bytes(pipe.device, *parts)
    assert all(weights > weight_bytes(pipe.device, *(m for m in parts if m is not left_out)) for left_out in parts)
    monkeypatch.setattr(pipe.vae, "chunk_bytes", 1)  # frames leave as they come: the clip as floats counts for nothing
    pipe("a", steps=1, height=64, width=96, num_frames=33)
    peak = peak_bytes(pipe.vae, "decode", tuple(pipe.last_run["shape"]), frames=True)
    monkeypatch.setattr(pipeline_module, "usable_memory", lambda _: weights + peak)
    whole = pipe("a", steps=1, height=64, width=96, num_frames=33, tiling=Tiling.auto())
    assert pipe.last_run["tiling"] is None
    monkeypatch.setattr(pipeline_module, "usable_memory", lambda _: weights + peak - 1)
    tiled = pipe("a", steps=1, height=64, width=96, num_frames=33, tiling="auto")
    assert pipe.last_run["tiling"].mode == "exact"
    assert (whole.int() - tiled.int()).abs().max() <= 1
    monkeypatch.setattr(pipeline_module, "usable_memory", lambda _: 0)
    with pytest.raises(ValueError, match="smaller height and width"):
        pipe("a", steps=1, height=64, width=96, num_frames=33, tiling="auto")
    pipe("a", steps=1, height=64, width=96, tiling="auto", output="latents")  # nothing is decoded
    with pytest.raises(ValueError, match=r"to encode \(1, 3, 1, 64, 96\)"):
        pipe("a", conditions=[Condition(picture())], steps=1, height=64, width=96, tiling="auto", output="latents")


def test_callback_can_stop_the_run(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []

    def stop(step: int, steps: int, latents: Tensor) -> None:
        seen.append((step, steps))
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        pipe("a", steps=4, callback=stop)
    assert seen == [(1, 4)]


def test_out_of_memory_names_the_option_that_helps(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> Tensor:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        )

    monkeypatch.setattr(pipe.vae, "decode_frames", decode)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory in decode on cpu: use tiling='auto'"):
        pipe("a")
    monkeypatch.setattr(pipe.vae, "decode_frames", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        pipe("a")


def test_a_pipeline_of_two_experts(pipe: Pipeline) -> None:
    assert isinstance(pipe.dit, WanDiT)
    pair = Pipeline(dit=ExpertPair(pipe.dit, pipe.dit), vae=pipe.vae, text_encoder=pipe.text_encoder, defaults=DEFAULTS)
    assert torch.equal(pair("a red circle", output="latents"), pipe("a red circle", output="latents"))


# ---- what is refused, before any model runs ----

LONG = np.zeros((9, 32, 48, 3), np.uint8)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "nothing says what to make: give prompt"),
    ({"prompt": ["a", "b"]}, "prompt must be a string, got list"),
    ({"prompt_embeds": torch.zeros(3, 16)}, "prompt and prompt_embeds were both given"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(3, 15)},
        r"prompt_embeds must be \[L, 16\] or \[1, L, 16\], got \[3, 15\]",
    ),
    ({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 16)}, r"prompt_embeds must be .* got \[2, 3, 16\]"),
    ({"prompt": None, "prompt_embeds": torch.zeros(0, 16)}, r"prompt_embeds must be"),
    (
        {"negative_prompt": "b", "negative_prompt_embeds": torch.zeros(3, 16)},
        "negative_prompt and negative_prompt_embeds were both",
    ),
    ({"negative_prompt_embeds": torch.zeros(16)}, r"negative_prompt_embeds must be"),
    ({"height": 40}, "height=40 is not a multiple of 16 pixels: use 32 or 48"),
    ({"num_frames": 6}, r"num_frames=6 is not 4n\+1"),
    ({"steps": 0}, "steps must be"),
    ({"seed": -1}, "seed must be"),
    ({"compat": "none"}, "unknown compat"),
    ({"fit": "zoom"}, "unknown fit"),
    ({"output": "gif"}, "unknown output"),
    ({"tiling": "tiles"}, "tiling='tiles' is not available: use None"),
    ({"conditions": [Condition(picture(), 2)]}, "latent 2 does not exist; the clip has latents 0 to 1"),
    ({"conditions": [Condition(picture()), Condition(picture(9))]}, "both give latent 0"),
    ({"conditions": [Condition(picture(), noise=2)]}, "noise must be a number"),
    ({"conditions": [Condition(LONG[:4], 1)]}, "latent 1 needs 5 frames of the clip, which has 4"),
    ({"conditions": [Condition(LONG.astype(np.float32))]}, "frames must be uint8 from 0 to 255, got float32"),
    ({"conditions": [Condition(torch.zeros(32, 48, 3))]}, "frames must be uint8 from 0 to 255, got float32"),
    (
        {"conditions": [Condition(np.zeros((3, 32, 48), np.uint8))]},
        r"frames must be \[H,W,3\] or \[T,H,W,3\], got \[3, 32, 48\]",
    ),
    ({"conditions": [Condition(np.zeros((0, 32, 48, 3), np.uint8))]}, "frames must be"),
    ({"conditions": [Condition([])]}, "the list of pictures is empty"),
    ({"conditions": [Condition(["a.png"])]}, "entry 0 is a str: use one Condition each"),
    ({"conditions": [Condition([picture(), picture(size=(9, 9))])]}, "the pictures of one clip differ in size"),
    ({"conditions": [Condition(3.5)]}, "media cannot be a float: give a path, a PIL image"),
    ({"conditions": ["first.png"]}, "not a Condition"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_refused(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str) -> None:
    def runs(*_: object, **__: object) -> None:
        raise AssertionError("a model ran")

    assert pipe.text_encoder is not None
    for part, names in (
        (pipe.text_encoder, ["encode"]),
        (pipe.vae, ["encode", "decode"]),
        (pipe.dit, ["prepare", "denoise"]),
    ):
        for name in names:
            monkeypatch.setattr(part, name, runs)
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**{"prompt": "a", **given})
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipe("a", conditions=[Condition(tmp_path / "nowhere.png")])
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(ValueError, match=name):
            pipe("a", conditions=[Condition(tmp_path / name)])


def test_parts_must_fit(pipe: Pipeline) -> None:
    other = WanVAE(VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    with pytest.raises(ValueError, match="maps 4 to 4 channels, the VAE's latents have 16: all three must agree"):
        Pipeline(dit=pipe.dit, vae=other)


def test_without_text_encoder(pipe: Pipeline) -> None:
    bare = Pipeline(dit=pipe.dit, vae=pipe.vae)
    assert bare.defaults == dict(WAN_DEFAULTS) and bare.spec == {} and bare.files is None
    given = {"num_frames": 5, "height": 32, "width": 48, "steps": 2}
    with pytest.raises(ValueError, match="no text encoder for prompt: give prompt_embeds"):
        bare("a", **given)
    with pytest.raises(ValueError, match=r"guidance needs negative_prompt_embeds, .* or guidance_scale=1"):
        bare(prompt_embeds=torch.zeros(3, 16), **given)
    assert bare(prompt_embeds=torch.zeros(3, 16), guidance_scale=1, **given).shape == (5, 32, 48, 3)


def test_gif_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "one.gif")
    picture().save(tmp_path / "two.gif", save_all=True, append_images=[picture(30)], duration=100)
    one, two = open_media(tmp_path / "one.gif"), open_media(tmp_path / "two.gif")
    assert one.frames is None and one.read(1).shape == (1, 32, 48, 3)
    assert two.frames == 2 and two.read(1).shape == (1, 32, 48, 3)
