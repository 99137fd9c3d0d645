"""The options of a clip and of a run: each is declared once, here, with its type, help and key.

The command line builds its parser from these classes, `Request` its JSON, clip.json its fields. An
option's name, with underscores, is its key in manifests and requests. `Option.key` is its name in
`Request` and clip.json where that differs.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

GIVEN, MODEL, OUTPUT = "Given frames", "Model", "Output"


@dataclass(frozen=True)
class Option:
    """How the command line shows an option, and its key in records. `panel`: its section of the
    help."""

    help: str
    metavar: str | None = None
    panel: str | None = None
    key: str | None = None
    flag: str | None = None  # where it is not --name
    argument: bool = False


def option(*about: Any, default: Any = None, **more: Any) -> Any:
    """A field that is an option; `about` and `more`: those of `Option`. `default` MISSING: it must
    be given."""
    return field(default=default, metadata={"option": Option(*about, **more)})


@dataclass(frozen=True)
class Declared:
    """An option as declared: `kind` is its type without None."""

    name: str
    kind: Any
    option: Option
    default: Any

    @property
    def key(self) -> str:
        return self.option.key or self.name

    @property
    def flag(self) -> str:
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def json_types(self) -> tuple[type, ...]:
        """Types of its value in JSON."""
        origin = get_origin(self.kind)
        if origin is Literal or self.kind is str:
            return (str,)
        return (list,) if origin in (list, tuple) else (int, float) if self.kind is float else (self.kind,)


@cache
def declared(options: type) -> Mapping[str, Declared]:
    """The options of a class by name, in the order of their declaration."""
    found, hints = {}, get_type_hints(options)
    for own in fields(options):
        kinds = [kind for kind in get_args(hints[own.name]) if kind is not types.NoneType]
        optional = get_origin(hints[own.name]) in (Union, types.UnionType)
        kind = kinds[0] if optional else hints[own.name]
        found[own.name] = Declared(own.name, kind, own.metadata["option"], own.default)
    return MappingProxyType(found)


Fit = Literal["crop", "pad", "stretch"]
TilingName = Literal["whole", "auto", "exact", "feather"]


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What makes one clip, as typed; None where not given."""

    prompt: str | None = option("What the clip shows.", argument=True)
    image: str | None = option("First frame.", "PATH", GIVEN)
    image_noise: float | None = option(
        "How freely it is redrawn. 0, the default, keeps it; Wan models move more at 0.2.", "0..1", GIVEN
    )
    end_image: str | None = option("Picture to end on.", "PATH", GIVEN)
    end_noise: float | None = option("As --image-noise (default 0).", "0..1", GIVEN)
    keyframe: list[str] | None = option(
        "Picture at a latent: 0 is the first frame, i the frames 4i-3 to 4i, -1 the last four. Repeatable.",
        "PATH@LATENT:NOISE",
        GIVEN,
    )
    video: str | None = option("Clip of which --keep stays.", "PATH", GIVEN)
    keep: str | None = option("Latents of --video to keep.", "0-3,...", GIVEN)
    keep_noise: str | None = option(
        "Noise of the kept latents: one for all, or one each (default 0; with --extend 0,0.3,0.4,0.5, "
        "the last repeated).",
        "N,N,...",
        GIVEN,
    )
    extend: str | None = option("Clip to continue; it is written too.", "PATH", GIVEN)
    overlap: int | None = option(
        "Last frames of --extend to continue from, 4k+1 (default 13, or what fits).", panel=GIVEN
    )
    transition: tuple[str, str] | None = option("Two clips to join; they are written too.", "FIRST SECOND", GIVEN)
    ends: int | None = option("Latents taken from each clip of --transition (default 3, or what fits).", panel=GIVEN)
    lora: list[str] | None = option(
        "LoRA, or none. Repeatable. high=, low= or both= before PATH chooses experts. (default: the model's own)",
        "PATH:STRENGTH",
        MODEL,
    )
    steps: int | None = option("Denoising steps (default: the model's).")
    guidance: float | None = option("Guidance scale, 1 for none (default: the model's).", key="guidance_scale")
    shift: float | None = option("Timestep shift (default: the model's).")
    seed: list[str] | None = option("Several make clip-SEED.mp4 each (default 0).", "N,N,...")
    frames: int | None = option("Frames to generate, 4k+1 (default: the model's).", key="num_frames")
    size: str | None = option("Multiples of 16 (default: the model's).", "WIDTHxHEIGHT")
    fps: float | None = option("Frames per second; given clips are resampled to it (default: the model's).")
    negative: str | None = option("Negative prompt (default: the model's).", "TEXT", key="negative_prompt")
    compat: Literal["reference", "exact"] | None = option(
        "Timesteps and frames as the reference rounds them, or exact (default reference)."
    )
    fit: Fit | None = option("How media of another size are fitted (default crop).", panel=GIVEN)
    tiling: TilingName | None = option(
        "VAE: whole frames (default); tiles that give the same result for less memory (exact), only "
        "where needed (auto); or blended ones, as in the reference (feather).",
        panel=MODEL,
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model runs, and where."""

    model: str | None = option("nano, or a model's folder (default nano).", "NAME|DIR", MODEL)
    device: str | None = option("cpu, cuda, cuda:1 (default: a GPU where there is one).", panel=MODEL)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, ClipOptions):
    """`pusa-fast generate`, as typed."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Of the transformer (default bfloat16 on a GPU, else float32).", panel=MODEL
    )
    precision: Literal["fp8"] | None = option(
        "Lossy: the transformer's matmuls on e4m3 rows; a GPU from Ada or Hopper on.", panel=MODEL
    )
    attention: str | None = option("Attention backend, see doctor (default auto).", panel=MODEL)
    out: str | None = option("clip.mp4, clip.gif, or clip/ for a folder of PNGs (default clip.mp4).", "PATH", OUTPUT)
    overwrite: bool = option("Replace existing files.", panel=OUTPUT, default=False)
    from_: str | None = option(
        "Make that clip again. Other options win over it; one that gives frames replaces all of its given frames.",
        "CLIP.JSON",
        OUTPUT,
        flag="--from",
    )


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(ModelOptions):
    """`pusa-fast prepare`, as typed."""

    source: str = option(
        "metadata.csv (file_name,text), a .jsonl file, a folder with either, or a folder of clips "
        "with a .txt of the same name each.",
        "SOURCE",
        argument=True,
        default=MISSING,
    )
    out: str = option("Folder to write, or to continue in.", "DIR", OUTPUT, default=MISSING)
    bucket: list[str] | None = option(
        "Size to bring clips to; pictures need one of 1 frame. Repeatable: each clip takes the "
        "nearest in aspect that it is long enough for. (default: the model's)",
        "WIDTHxHEIGHTxFRAMES",
        key="buckets",
    )
    fps: float | None = option("Resample clips to so many frames per second (default: every frame of the clip).")
    clips_per_video: int | None = option("Windows taken from each file, evenly spaced; they may overlap (default 1).")
    start: Literal["first", "middle", "random"] | None = option(
        "Where windows begin: at the first frame, in the middle, or anywhere as --seed says (default first)."
    )
    seed: int | None = option("Of --start random (default 0).")
    fit: Fit | None = option("How frames are brought to the bucket's size (default crop).")
    dtype: Literal["bfloat16", "float32", "float16"] | None = option(
        "Of the stored latents and text (default bfloat16).", panel=OUTPUT
    )
    tiling: TilingName | None = option("VAE: as in generate (default whole).", panel=MODEL)
    shard_clips: int | None = option("Clips in one file of latents (default 64).", panel=OUTPUT)
    ignore_tensors: bool = option(
        "Encode again where there is the reference's FILE.tensors.pth next to a clip.", default=False
    )
    add: bool = option(
        "Also train on the clips that DIR already has (default: on those of SOURCE alone).", panel=OUTPUT, default=False
    )
    strict: bool = option("Stop at the first bad clip instead of listing it.", default=False)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`pusa-fast export`, as typed."""

    source: str = option("A training run's folder, or a LoRA file.", "RUN|LORA", argument=True, default=MISSING)
    out: str = option("The .safetensors file to write.", "PATH", default=MISSING)
    style: Literal["released", "diffusers", "comfyui"] | None = option(
        "Names of a LoRA's weights: Pusa's own, diffusers' or ComfyUI's (default released)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option("Of the weights (default bfloat16).")
    step: str | None = option(
        "Of a run: the checkpoint of this step, or the best by validation loss (default: the newest).", "N|best"
    )
    overwrite: bool = option("Replace an existing file.", default=False)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """`pusa-fast train`, as typed."""

    config: str | None = option("Settings; docs/training.md lists them.", "CONFIG.YAML", argument=True)
    set_: list[str] | None = option("A setting, such as optim.lr=1e-5. Repeatable.", "NAME=VALUE", flag="--set")
    plan: bool = option("Only say what it will take: memory by part, work and time of a step.", default=False)
    processes: int | None = option("With --plan: shared by so many (default 1).")
