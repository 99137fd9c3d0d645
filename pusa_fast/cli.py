"""The command line: parses, calls `pusa_fast.commands`, and turns every error into one line and an
exit code.

Exit codes: 0 done; 2 bad input, one line on stderr; 130 interrupted; 1 a defect of this program.
PUSA_FAST_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pusa_fast.commands import bench
from pusa_fast.commands.parser import command
from pusa_fast.errors import ArgumentError
from pusa_fast.options import ExportOptions, GenerateOptions, PrepareOptions, TrainOptions, declared

# What a system error's code lets us advise.
_MENDS = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file, not a folder",
    errno.EACCES: "check its permissions",
    errno.ENOSPC: "free some space, or choose another --out",
    errno.EDQUOT: "free some space, or choose another --out",
}


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
            from pusa_fast.device import is_out_of_memory

            if not is_out_of_memory(error):
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
    if isinstance(error, ArgumentError):
        return _FLAGS.get(error.argument, "--" + error.argument.replace("_", "-")) + error.problem
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        mend = _MENDS.get(error.errno)
        return f"{where}{error.strerror.lower()}" + (f": {mend}" if mend else "")
    return str(error) or type(error).__name__


# An argument of the library -> the option that gives it, where the names differ.
_FLAGS = {option.key: option.flag for option in declared(GenerateOptions).values() if option.key != option.name}
_FLAGS |= {"height": "--size: height", "width": "--size: width", "buckets": "--bucket"}

# Stage in which memory ran out -> the options that help there.
_RELIEF = {
    "text": "--dtype bfloat16",
    "encode": "--tiling auto, or a smaller --size",
    "denoise": "fewer --frames, a smaller --size, --guidance 1, or --dtype bfloat16",
    "train": "--set accumulate=N, --set memory.offload=true, or --set parallel=fsdp on more processes; --plan says "
    "what a step takes",
    "decode": "--tiling auto, a smaller --size, or fewer --frames",
    "prepare": "--tiling auto, or a smaller --bucket",
    "validation": "--set validation.num_frames=N, --set validation.width=W, --set validation.height=H smaller ones, or "
    "no validation.samples; the steps so far are saved",
}


def _relief(error: Exception) -> str:
    """What to type when memory ran out: by the stage that the error carries, else in general."""
    options = _RELIEF.get(getattr(error, "stage", ""))
    if options is None:
        return "out of memory: give --tiling auto, a smaller --size, fewer --frames, or --dtype bfloat16"
    return f"out of memory in {error.stage} {error.where}: give {options}"  # type: ignore[attr-defined]


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


@command(app, GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Make a clip. With clip.mp4 come clip.png, a contact sheet, and clip.json, every setting."""
    from pusa_fast.commands.generate import run

    run(options)


@command(app, PrepareOptions)
def prepare(options: PrepareOptions) -> None:
    """Encode clips and captions for training. Run again after a stop, it continues; report.json
    lists what was left out."""
    from pusa_fast.commands.prepare import run

    run(options)


@command(app, TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a Pusa LoRA, or all weights, on prepared clips. Stopped or killed, the same command
    continues.

    Several processes: torchrun --nproc-per-node 8 -m pusa_fast.cli train CONFIG.YAML
    """
    from pusa_fast.commands.train import run

    run(options)


@command(app, ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a LoRA as other tools read it, from a checkpoint or a file; of a run that trains all
    weights, the transformer."""
    from pusa_fast.commands.export import run

    run(options)


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
