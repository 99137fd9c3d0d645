"""`pusa-fast bench`: measurements, from a checkout. Its options are parsed here, since nothing but them is in the package.

stdout ends with one JSON document; everything else goes to stderr.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pusa_fast

app = typer.Typer(help="Measure: ops, attention, the transformer, the VAE, whole runs. Works in a checkout only.")

Device = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where (default: a GPU where there is one).")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, warm caches: shows that it runs, not how fast.")]
Out = Annotated[str | None, typer.Option(metavar="FILE", help="Write the result there too, step by step.")]
Seconds = Annotated[float | None, typer.Option(min=1, help="Start nothing new after that many seconds.")]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="14b-480p, 14b-720p, 1.3b-480p, 1.3b-2k, tiny. Repeatable.")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="fp32|bf16", help="Repeatable (default: both on a CPU, bf16 on a GPU)."),
]
Providers = Annotated[list[str] | None, typer.Option("--provider", help="Who computes it (default all). Repeatable.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def ops(
    op: Annotated[list[str] | None, typer.Option("--op", help="Default all. Repeatable.")] = None,
    shape: Shapes = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """Each op: time, GB/s, per cent of the copy bandwidth of the same run; beside plain torch, torch.compile, others' formulations."""
    _run(
        "ops",
        device,
        quick,
        seconds,
        out,
        ops=_names(op),
        shapes=_names(shape),
        dtypes=_names(dtype),
        providers=_names(provider),
    )


@app.command()
def attention(
    shape: Shapes = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """Every attention backend that can be used here, forward and backward."""
    _run(
        "attention", device, quick, seconds, out, shapes=_names(shape), dtypes=_names(dtype), providers=_names(provider)
    )


@app.command()
def dit(
    shape: Shapes = None,
    dtype: Dtypes = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """A forward of the transformer beside diffusers' on the same weights, and beside its bare products and attention."""
    _run("dit", device, quick, seconds, out, shapes=_names(shape), dtypes=_names(dtype))


@app.command()
def vae(
    size: Annotated[
        str | None, typer.Option(metavar="480p|720p", help="On a GPU: 81 frames of 832x480 or 1280x720 (default both).")
    ] = None,
    dtype: Dtypes = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """Encode and decode beside diffusers' VAE on the same weights and beside the bare convolutions; tilings and chunk sizes."""
    _run("vae", device, quick, seconds, out, size=size, dtypes=_names(dtype))


@app.command()
def e2e(
    model: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="nano, a model's folder, or with --random-weights a size.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A model of that size, made up: times, no pictures.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(metavar="480p|720p", help="81 frames of 832x480 or 1280x720 (default 480p).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default 4).")] = None,
    precision: Annotated[str | None, typer.Option(metavar="fp8", help="Of the transformer's products.")] = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """Whole runs with their stages, and forwards beside the roofline."""
    _run(
        "e2e", device, quick, seconds, out, model=model, random_weights=random_weights, size=size, steps=steps, precision=precision
    )  # fmt: skip


@app.command()
def train(
    size: Annotated[
        str | None, typer.Option(metavar="480p|720p", help="On a GPU: 81 frames of 832x480 or 1280x720 (default 480p).")
    ] = None,
    device: Device = None,
    quick: Quick = False,
    seconds: Seconds = None,
    out: Out = None,
) -> None:
    """A step of LoRA training: on the CPU nano beside the reference's formulation, on a GPU the 14B model at rank 512."""
    _run("train", device, quick, seconds, out, size=size)


@app.command()
def numerics(device: Device = None, quick: Quick = False, out: Out = None) -> None:
    """What bf16 and fp8 cost in accuracy against float32, on nano."""
    _run("numerics", device, quick, None, out)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A result file, or a git ref.")],
    after: Annotated[str, typer.Argument(help='Likewise. "." is the working tree.')],
    kind: Annotated[str, typer.Option(help="What to measure, for git refs.")] = "ops",
    rounds: Annotated[int, typer.Option(help="Runs of each, turn and turn about, for git refs.")] = 2,
    op: Annotated[list[str] | None, typer.Option("--op", help="Repeatable.")] = None,
    shape: Shapes = None,
    dtype: Dtypes = None,
    provider: Providers = None,
    device: Device = None,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Two results, or two versions measured now: ratios with a noise band."""
    harness = load("harness")
    options = harness.Options(
        device, quick, None, None, _names(shape), _names(dtype), _names(op), _names(provider)
    )  # fmt: skip
    with harness.quiet_stdout():
        result = load("compare").run(before, after, kind, options, rounds)
    if out is not None:
        harness.write_json(out, result)
    harness.print_json(result)


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where a table is out of date.")] = False,
) -> None:
    """Write the tables of the documents from bench/results."""
    harness = load("harness")
    result = load("report").run(check)
    if check and result["changed"]:
        raise ValueError(f"out of date: {', '.join(result['changed'])}: run pusa-fast bench report")
    harness.print_json(result)


def _names(given: list[str] | None) -> tuple[str, ...]:
    return tuple(given or ())


def _run(kind: str, device: str | None, quick: bool, seconds: float | None, out: str | None, **more: Any) -> None:
    harness = load("harness")
    with harness.quiet_stdout():
        result = harness.execute(kind, harness.Options(device=device, quick=quick, seconds=seconds, out=out, **more))
    harness.print_json(result)


def load(name: str) -> Any:
    """A module of the folder bench/ beside the package. Raises ValueError outside a checkout."""
    root = checkout()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"bench.{name}")


def checkout() -> Path:
    """The folder that holds the package and bench/. Raises ValueError where the package was installed without it."""
    root = Path(pusa_fast.__file__).resolve().parents[1]
    if not (root / "bench" / "harness.py").is_file():
        raise ValueError(
            f"the installed package ({root / 'pusa_fast'}) carries no bench: run it from a checkout of the repository, installed with pip install -e ."
        )
    return root
