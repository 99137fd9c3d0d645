"""The options of a clip and of a run: each is declared once, here, with its type, help and key.

The command line builds its parser from these classes, `Request` its JSON, clip.json its fields. An option's name, with
underscores, is its key in manifests and requests. `Option.key` is its name in `Request` and clip.json where that differs.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

GIVEN, MODEL, OUTPUT = "Given frames", "Model", "Output"


@dataclass(frozen=True)
class Option:
    """How the command line shows an option, and its key in records. `panel`: its section of the help."""

    help: str
    metavar: str | None = None
    panel: str | None = None
    key: str | None = None
    flag: str | None = None  # where it is not --name
    argument: bool = False


@dataclass(frozen=True)
class Declared:
    """An option as declared: `kind` is its type without None, `item` that of its elements where it is a list."""

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
    found = {}
    hints, defaults = get_type_hints(options, include_extras=True), {f.name: f.default for f in fields(options)}
    for name in defaults:
        hint, option = get_args(hints[name])
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        kind = kinds[0] if get_origin(hint) in (Union, types.UnionType) else hint
        found[name] = Declared(name, kind, option, defaults[name])
    return MappingProxyType(found)


Size = Annotated[str | None, Option("Multiples of 16 (default: the model's).", "WIDTHxHEIGHT")]
Fit = Literal["crop", "pad", "stretch"]
TilingName = Literal["whole", "auto", "exact", "feather"]


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What makes one clip, as typed; None where not given."""

    prompt: Annotated[str | None, Option("What the clip shows.", argument=True)] = None
    image: Annotated[str | None, Option("First frame.", "PATH", GIVEN)] = None
    image_noise: Annotated[
        float | None,
        Option("How freely it is redrawn. 0, the default, keeps it; Wan models move more at 0.2.", "0..1", GIVEN),
    ] = None
    end_image: Annotated[str | None, Option("Picture to end on.", "PATH", GIVEN)] = None
    end_noise: Annotated[float | None, Option("As --image-noise (default 0).", "0..1", GIVEN)] = None
    keyframe: Annotated[
        list[str] | None,
        Option(
            "Picture at a latent: 0 is the first frame, i the frames 4i-3 to 4i, -1 the last four. Repeatable.",
            "PATH@LATENT:NOISE",
            GIVEN,
        ),
    ] = None
    video: Annotated[str | None, Option("Clip of which --keep stays.", "PATH", GIVEN)] = None
    keep: Annotated[str | None, Option("Latents of --video to keep.", "0-3,...", GIVEN)] = None
    keep_noise: Annotated[
        str | None,
        Option(
            "Noise of the kept latents: one for all, or one each (default 0; with --extend 0,0.3,0.4,0.5, the last "
            "repeated).",
            "N,N,...",
            GIVEN,
        ),
    ] = None
    extend: Annotated[str | None, Option("Clip to continue; it is written too.", "PATH", GIVEN)] = None
    overlap: Annotated[
        int | None, Option("Last frames of --extend to continue from, 4k+1 (default 13, or what fits).", panel=GIVEN)
    ] = None
    transition: Annotated[
        tuple[str, str] | None, Option("Two clips to join; they are written too.", "FIRST SECOND", GIVEN)
    ] = None
    ends: Annotated[
        int | None, Option("Latents taken from each clip of --transition (default 3, or what fits).", panel=GIVEN)
    ] = None
    lora: Annotated[
        list[str] | None,
        Option(
            "LoRA, or none. Repeatable. high=, low= or both= before PATH chooses experts. (default: the model's own)",
            "PATH:STRENGTH",
            MODEL,
        ),
    ] = None
    steps: Annotated[int | None, Option("Denoising steps (default: the model's).")] = None
    guidance: Annotated[
        float | None, Option("Guidance scale, 1 for none (default: the model's).", key="guidance_scale")
    ] = None
    shift: Annotated[float | None, Option("Timestep shift (default: the model's).")] = None
    seed: Annotated[list[str] | None, Option("Several make clip-SEED.mp4 each (default 0).", "N,N,...")] = None
    frames: Annotated[int | None, Option("Frames to generate, 4k+1 (default: the model's).", key="num_frames")] = None
    size: Size = None
    fps: Annotated[
        float | None, Option("Frames per second; given clips are resampled to it (default: the model's).")
    ] = None
    negative: Annotated[
        str | None, Option("Negative prompt (default: the model's).", "TEXT", key="negative_prompt")
    ] = None
    compat: Annotated[
        Literal["reference", "exact"] | None,
        Option("Timesteps and frames as the reference rounds them, or exact (default reference)."),
    ] = None
    fit: Annotated[Fit | None, Option("How media of another size are fitted (default crop).", panel=GIVEN)] = None
    tiling: Annotated[
        TilingName | None,
        Option(
            "VAE: whole frames (default); tiles that give the same result for less memory (exact), only where needed "
            "(auto); or blended ones, as in the reference (feather).",
            panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model runs, and where."""

    model: Annotated[str | None, Option("nano, or a model's folder (default nano).", "NAME|DIR", MODEL)] = None
    device: Annotated[str | None, Option("cpu, cuda, cuda:1 (default: a GPU where there is one).", panel=MODEL)] = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions, ClipOptions):
    """`pusa-fast generate`, as typed."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option("Of the transformer (default bfloat16 on a GPU, else float32).", panel=MODEL),
    ] = None
    precision: Annotated[
        Literal["fp8"] | None,
        Option("Lossy: the transformer's matmuls on e4m3 rows; a GPU from Ada or Hopper on.", panel=MODEL),
    ] = None
    attention: Annotated[str | None, Option("Attention backend, see doctor (default auto).", panel=MODEL)] = None
    out: Annotated[
        str | None, Option("clip.mp4, clip.gif, or clip/ for a folder of PNGs (default clip.mp4).", "PATH", OUTPUT)
    ] = None
    overwrite: Annotated[bool, Option("Replace existing files.", panel=OUTPUT)] = False
    from_: Annotated[
        str | None,
        Option(
            "Make that clip again. Other options win over it; one that gives frames replaces all of its given frames.",
            "CLIP.JSON",
            OUTPUT,
            flag="--from",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(ModelOptions):
    """`pusa-fast prepare`, as typed."""

    source: Annotated[
        str,
        Option(
            "metadata.csv (file_name,text), a .jsonl file, a folder with either, or a folder of clips with a .txt of the "
            "same name each.",
            "SOURCE",
            argument=True,
        ),
    ]
    out: Annotated[str, Option("Folder to write, or to continue in.", "DIR", OUTPUT)]
    bucket: Annotated[
        list[str] | None,
        Option(
            "Size to bring clips to; pictures need one of 1 frame. Repeatable: each clip takes the nearest in aspect that "
            "it is long enough for. (default: the model's)",
            "WIDTHxHEIGHTxFRAMES",
            key="buckets",
        ),
    ] = None
    fps: Annotated[
        float | None, Option("Resample clips to so many frames per second (default: every frame of the clip).")
    ] = None
    clips_per_video: Annotated[
        int | None, Option("Windows taken from each file, evenly spaced; they may overlap (default 1).")
    ] = None
    start: Annotated[
        Literal["first", "middle", "random"] | None,
        Option("Where windows begin: at the first frame, in the middle, or anywhere as --seed says (default first)."),
    ] = None
    seed: Annotated[int | None, Option("Of --start random (default 0).")] = None
    fit: Annotated[Fit | None, Option("How frames are brought to the bucket's size (default crop).")] = None
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"] | None,
        Option("Of the stored latents and text (default bfloat16).", panel=OUTPUT),
    ] = None
    tiling: Annotated[TilingName | None, Option("VAE: as in generate (default whole).", panel=MODEL)] = None
    shard_clips: Annotated[int | None, Option("Clips in one file of latents (default 64).", panel=OUTPUT)] = None
    ignore_tensors: Annotated[
        bool, Option("Encode again where there is the reference's FILE.tensors.pth next to a clip.")
    ] = False
    add: Annotated[
        bool,
        Option("Also train on the clips that DIR already has (default: on those of SOURCE alone).", panel=OUTPUT),
    ] = False
    strict: Annotated[bool, Option("Stop at the first bad clip instead of listing it.")] = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`pusa-fast export`, as typed."""

    source: Annotated[str, Option("A training run's folder, or a LoRA file.", "RUN|LORA", argument=True)]
    out: Annotated[str, Option("The .safetensors file to write.", "PATH")]
    style: Annotated[
        Literal["released", "diffusers", "comfyui"] | None,
        Option("Names of a LoRA's weights: Pusa's own, diffusers' or ComfyUI's (default released)."),
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Option("Of the weights (default bfloat16).")] = (
        None
    )
    step: Annotated[
        str | None,
        Option(
            "Of a run: the checkpoint of this step, or the best by validation loss (default: the newest).", "N|best"
        ),
    ] = None
    overwrite: Annotated[bool, Option("Replace an existing file.")] = False


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """`pusa-fast train`, as typed."""

    config: Annotated[str | None, Option("Settings; docs/training.md lists them.", "CONFIG.YAML", argument=True)] = None
    set_: Annotated[
        list[str] | None, Option("A setting, such as optim.lr=1e-5. Repeatable.", "NAME=VALUE", flag="--set")
    ] = None
    plan: Annotated[bool, Option("Only say what it will take: memory by part, work and time of a step.")] = False
    processes: Annotated[int | None, Option("With --plan: shared by so many (default 1).")] = None
