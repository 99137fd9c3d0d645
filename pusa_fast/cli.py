"""The command line: parses, calls `pusa_fast.commands`, and turns every error into one line and an exit code.

Exit codes: 0 done; 2 bad input, one line on stderr; 130 interrupted; 1 a defect of this program. PUSA_FAST_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pusa_fast.commands import bench

# What a system error's code lets us advise.
_MENDS = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.EACCES: "check its permissions",
    errno.ENOSPC: "free some space, or choose another --out",
    errno.EDQUOT: "free some space, or choose another --out",
}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class _Group(TyperGroup):
    """Answers what a user can mend with one line instead of a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(words, prog_name or "pusa-fast", complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:  # usage: an unknown option, a missing value
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "pusa-fast"
            code = _answer(error, f"{error.format_message().replace('Value error, ', '')} (see {path} --help)")
        except (ValueError, OSError, ImportError, ArithmeticError) as error:
            code = _answer(error, _message(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            code = _answer(error, _relief(error))
        if code == 130:
            typer.echo("interrupted", err=True)
        sys.exit(code if isinstance(code, int) else 0)


def _answer(error: Exception, message: str) -> int:
    if os.environ.get("PUSA_FAST_DEBUG") == "1":
        raise error
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        mend = _MENDS.get(error.errno)
        return f"{where}{error.strerror.lower()}" + (f": {mend}" if mend else "")
    return str(error) or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


# Stage in which memory ran out -> the options that help there.
_RELIEF = {
    "text": "--dtype bfloat16",
    "encode": "--tiling auto, or a smaller --size",
    "denoise": "fewer --frames, a smaller --size, --guidance 1, or --dtype bfloat16",
    "train": "--set accumulate=N, --set memory.offload=true, or --set parallel=fsdp on more processes; --plan says what a step takes",
    "decode": "--tiling auto, a smaller --size, or fewer --frames",
    "prepare": "--tiling auto, or a smaller --bucket",
    "validation": "--set validation.num_frames=N, --set validation.width=W, --set validation.height=H smaller ones, or no validation.samples; the steps so far are saved",
}


def _relief(error: Exception) -> str:
    """The pipeline says in which stage memory ran out ("out of memory in decode on cpu: ..."), in terms of its own arguments."""
    said = str(error).split(":")[0]
    for stage, options in _RELIEF.items():
        if said.startswith(f"out of memory in {stage}"):
            return f"{said}: give {options}"
    return "out of memory: give --tiling auto, a smaller --size, fewer --frames, or --dtype bfloat16"


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Runs Pusa: video from text, pictures and clips.",
)
app.add_typer(bench.app, name="bench")  # parses its own options


def _version(wanted: bool) -> None:
    if wanted:
        from pusa_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text.strip()):
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


_GIVEN = "Given frames"
_MODEL = "Model"
_OUTPUT = "Output"


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the clip shows.")] = None,
    image: Annotated[str | None, typer.Option(metavar="PATH", help="First frame.", rich_help_panel=_GIVEN)] = None,
    image_noise: Annotated[
        float | None,
        typer.Option(
            parser=_number,
            metavar="0..1",
            help="How freely it is redrawn. 0, the default, keeps it; Wan models move more at 0.2.",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    end_image: Annotated[
        str | None, typer.Option(metavar="PATH", help="Picture to end on.", rich_help_panel=_GIVEN)
    ] = None,
    end_noise: Annotated[
        float | None,
        typer.Option(parser=_number, metavar="0..1", help="As --image-noise (default 0).", rich_help_panel=_GIVEN),
    ] = None,
    keyframe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH@LATENT:NOISE",
            help="Picture at a latent: 0 is the first frame, i the frames 4i-3 to 4i, -1 the last four. Repeatable.",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    video: Annotated[
        str | None, typer.Option(metavar="PATH", help="Clip of which --keep stays.", rich_help_panel=_GIVEN)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="0-3,...", help="Latents of --video to keep.", rich_help_panel=_GIVEN)
    ] = None,
    keep_noise: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Noise of the kept latents: one for all, or one each (default 0; with --extend 0,0.3,0.4,0.5, the last repeated).",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    extend: Annotated[
        str | None, typer.Option(metavar="PATH", help="Clip to go on from; it is written too.", rich_help_panel=_GIVEN)
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            parser=_whole,
            help="Last frames of --extend to go on from, 4k+1 (default 13, or what fits).",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    transition: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="FIRST SECOND", help="Two clips to join; they are written too.", rich_help_panel=_GIVEN),
    ] = None,
    ends: Annotated[
        int | None,
        typer.Option(
            parser=_whole,
            help="Latents taken from either clip of --transition (default 3, or what fits).",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="nano, or a model's folder (default nano).", rich_help_panel=_MODEL),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH:STRENGTH",
            help="LoRA, or none. Repeatable. (default: the model's own)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(parser=_whole, help="Denoising steps (default: the model's).")] = None,
    guidance: Annotated[
        float | None, typer.Option(parser=_number, help="Guidance scale, 1 for none (default: the model's).")
    ] = None,
    shift: Annotated[float | None, typer.Option(parser=_number, help="Timestep shift (default: the model's).")] = None,
    seed: Annotated[
        list[str] | None, typer.Option(metavar="N,N,...", help="Several make clip-SEED.mp4 each (default 0).")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(parser=_whole, help="Frames to generate, 4k+1 (default: the model's).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Multiples of 16 (default: the model's).")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(parser=_number, help="Frames per second; given clips are resampled to it (default: the model's)."),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Negative prompt (default: the model's).")
    ] = None,
    compat: Annotated[
        Literal["reference", "exact"] | None,
        typer.Option(help="Timesteps and frames as the reference rounds them, or exact (default reference)."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 (default: a GPU where there is one).", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the transformer (default bfloat16 on a GPU, else float32).", rich_help_panel=_MODEL),
    ] = None,
    precision: Annotated[
        Literal["fp8"] | None,
        typer.Option(
            help="Lossy: the transformer's products on e4m3 rows; a GPU from Ada or Hopper on.", rich_help_panel=_MODEL
        ),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention backend, see doctor (default auto).", rich_help_panel=_MODEL)
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"] | None,
        typer.Option(help="How media of another size are fitted (default crop).", rich_help_panel=_GIVEN),
    ] = None,
    tiling: Annotated[
        Literal["whole", "auto", "exact", "feather"] | None,
        typer.Option(
            help="VAE: whole frames (default); tiles that give the same result for less memory (exact), where needed (auto); or blended ones, as the reference's (feather).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="clip.mp4, clip.gif, or clip/ for a folder of PNGs (default clip.mp4).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=_OUTPUT)
    ] = False,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CLIP.JSON",
            help="Make that clip again. Other options win over it; one that gives frames replaces all of its given frames.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Make a clip. Beside clip.mp4 lie clip.png, a contact sheet, and clip.json, every setting."""
    from pusa_fast.commands.generate import run
    from pusa_fast.commands.job import Options
    from pusa_fast.commands.plan import Inputs

    inputs = Inputs(
        image,
        image_noise,
        end_image,
        end_noise,
        tuple(keyframe or ()),
        video,
        keep,
        keep_noise,
        extend,
        overlap,
        transition,
        ends,
    )
    options = Options(
        prompt, model, lora, steps, guidance, shift, seed, frames, size, fps, negative, compat, device, dtype, precision, attention, fit,
        tiling, out, overwrite, from_,
    )  # fmt: skip
    run(options, inputs)


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="metadata.csv (file_name,text), a .jsonl file, a folder with either, or a folder of clips with a .txt of the same name each.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder to write, or to go on in.", rich_help_panel=_OUTPUT)],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="nano, or a model's folder (default nano).", rich_help_panel=_MODEL),
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHTxFRAMES",
            help="Size to bring clips to; pictures need one of 1 frame. Repeatable: each clip takes the nearest in aspect that it is long enough for. (default: the model's)",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            parser=_number, help="Resample clips to so many frames per second (default: every frame of the clip)."
        ),
    ] = None,
    clips_per_video: Annotated[
        int | None,
        typer.Option(parser=_whole, help="Windows taken from each file, evenly spaced; they may overlap (default 1)."),
    ] = None,
    start: Annotated[
        Literal["first", "middle", "random"] | None,
        typer.Option(
            help="Where windows begin: from the first frame on, in the middle, or anywhere as --seed says (default first)."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(parser=_whole, help="Of --start random (default 0).")] = None,
    fit: Annotated[
        Literal["crop", "pad", "stretch"] | None,
        typer.Option(help="How frames are brought to the bucket's size (default crop)."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 (default: a GPU where there is one).", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"] | None,
        typer.Option(help="Of the stored latents and text (default bfloat16).", rich_help_panel=_OUTPUT),
    ] = None,
    tiling: Annotated[
        Literal["whole", "auto", "exact", "feather"] | None,
        typer.Option(help="VAE: as in generate (default whole).", rich_help_panel=_MODEL),
    ] = None,
    shard_clips: Annotated[
        int | None,
        typer.Option(parser=_whole, help="Clips in one file of latents (default 64).", rich_help_panel=_OUTPUT),
    ] = None,
    ignore_tensors: Annotated[
        bool,
        typer.Option("--ignore-tensors", help="Encode anew where the reference's FILE.tensors.pth lies beside a clip."),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Train on the clips prepared into DIR before, too (default: on those of SOURCE alone).",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad clip instead of listing it.")] = False,
) -> None:
    """Encode clips and captions for training. Run again after a stop, it goes on; report.json lists clips that could not be used."""
    from pusa_fast.commands.prepare import Options, run

    run(
        Options(
            source, out, model, bucket, fps, clips_per_video, start, seed, fit, device, dtype, tiling, shard_clips, ignore_tensors, add, strict,
        )
    )  # fmt: skip


@app.command()
def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.YAML", help="Settings; docs/training.md lists them.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting, such as optim.lr=1e-5. Repeatable."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it will take: memory by part, work and time of a step.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(parser=_whole, help="With --plan: shared by so many (default 1).")
    ] = None,
) -> None:
    """Train a Pusa LoRA, or all weights, on prepared clips. Stopped or killed, the same command goes on.

    Several processes: torchrun --nproc-per-node 8 -m pusa_fast.cli train CONFIG.YAML
    """
    from pusa_fast.commands.train import run

    run(config, set_ or [], plan, processes)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|LORA", help="A training run's folder, or a LoRA file.")],
    out: Annotated[str, typer.Option(metavar="PATH", help="The .safetensors file to write.")],
    style: Annotated[
        Literal["released", "diffusers", "comfyui"] | None,
        typer.Option(help="Names of a LoRA's weights: Pusa's own, diffusers' or ComfyUI's (default released)."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights (default bfloat16).")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            metavar="N|best",
            help="Of a run: the checkpoint of this step, or the best by validation loss (default: the newest).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a LoRA as other tools read it, from a run's checkpoint or from a file; of a run that trains all weights, the transformer."""
    from pusa_fast.commands.export import run

    run(source, out, style, dtype or "bfloat16", step, overwrite)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As one JSON document.")] = False) -> None:
    """Print the environment, which backends can be used here, and why the others cannot."""
    from pusa_fast.commands.doctor import run

    run(as_json)


def _report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(
        f"internal error: {kind.__name__}: {' '.join(str(error).split())}; PUSA_FAST_DEBUG=1 shows where",
        file=sys.stderr,
    )


def main() -> None:
    """Entry point of the `pusa-fast` program."""
    if os.environ.get("PUSA_FAST_DEBUG") != "1":
        sys.excepthook = _report_defect
    # A warning is one line too, without the source line it came from.
    warnings.formatwarning = lambda message, *_args, **_named: f"warning: {message}\n"
    typer.main.get_command(app).main()


if __name__ == "__main__":
    main()
