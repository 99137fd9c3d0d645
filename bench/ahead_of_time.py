"""Compiles every Triton kernel without a GPU: registers, spills, shared memory, memory accesses.

    python -m bench.ahead_of_time [--json out.json] [--arch 90] [--model 14B] [--op qk_rope]

The launchers themselves run on meta tensors, with a compilation instead of a launch. The result
has the launch parameters, the specialisation and the dtypes of production (bf16 weights, float32
tables). Not in a process under TRITON_INTERPRET, which has no compiler.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pusa_fast.kernels import flow, fp8, norm, qk_rope, residual_norm, step, vae_act

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
REGISTER_FILE = 64 << 10  # registers of an SM, which one block must fit
EPS = 1e-6


@dataclass(frozen=True)
class Model:
    """Shapes of one transformer, at the grid of tokens of one clip."""

    heads: int
    head_dim: int
    ffn: int
    grid: tuple[int, int, int]
    latents: tuple[int, int, int, int, int]
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")

    def stream(self) -> Tensor:
        return self.empty(1, self.tokens, self.dim)

    def modulation(self, index: int) -> Tensor:
        """One of the six rows [1, F, D] of a block's float32 table, as the model passes it."""
        return self.empty(1, self.grid[0], 6, self.dim, dtype=torch.float32)[:, :, index]

    def row(self) -> Tensor:
        """A weight, in the model's dtype."""
        return self.empty(self.dim)

    def stats(self) -> Tensor:
        return self.empty(1, self.tokens, dtype=torch.float32)


MODELS = {
    "14B": Model(40, 128, 13824, (21, 30, 52), (1, 16, 21, 60, 104), torch.bfloat16),
    "1.3B": Model(12, 128, 8960, (21, 30, 52), (1, 16, 21, 60, 104), torch.bfloat16),
    "nano": Model(5, 32, 640, (5, 4, 4), (1, 16, 5, 8, 8), torch.float32),
}


@dataclass(frozen=True)
class Stage:
    """Pixels between two convolutions of the VAE: `dim` channels, views of longer windows."""

    dim: int
    dtype: torch.dtype
    clip: tuple[int, int, int] = (4, 240, 416)

    def pixels(self, past: int = 0) -> Tensor:
        frames, height, width = self.clip
        return torch.empty(1, past + frames, height, width, self.dim, dtype=self.dtype, device="meta")[:, past:]

    def phases(self) -> Tensor:
        frames, height, width = self.clip
        return torch.empty(1, frames, height // 2 + 1, width // 2 + 1, 4 * self.dim, dtype=self.dtype, device="meta")

    def row(self) -> Tensor:
        return torch.empty(self.dim, dtype=self.dtype, device="meta")


STAGES = {
    f"VAE {channels} {str(dtype).removeprefix('torch.')}": Stage(channels, dtype)
    for dtype, widths in (
        (torch.bfloat16, (96, 192, 384, 8, 16, 32, 64)),
        (torch.float32, (96, 192, 384, 8, 16, 32, 64)),
        (torch.float16, (96, 384)),
    )
    for channels in widths
}


@dataclass(frozen=True)
class Case:
    """A call of one launcher. `forward`: it moves whole rows, 16 bytes at a time."""

    op: str
    variant: str
    call: Callable[[Any], Any]  # of a Model, or a Stage
    forward: bool = True
    fp8: bool = False


# Every form of residual_norm: what is added to x, and how its norm is modulated.
_RESIDUALS = {"gate": ("y", "gate"), "no gate": ("y",), "no y": ()}
_NORMS = {"modulation": ("scale", "shift"), "affine": ("weight", "bias"), "bare": ()}
_RESIDUAL_FORMS = {f"{r}, {n}": {*_RESIDUALS[r], *_NORMS[n]} for r, n in itertools.product(_RESIDUALS, _NORMS)}


def _operands(m: Model, form: str) -> dict[str, Tensor | None]:
    """y, gate, scale, shift, weight, bias. K1 is "gate, modulation", K3 "gate, affine"."""
    makers = {
        "y": m.stream,
        "gate": functools.partial(m.modulation, 2),
        "scale": functools.partial(m.modulation, 1),
        "shift": functools.partial(m.modulation, 0),
        "weight": m.row,
        "bias": m.row,
    }
    return {name: make() if name in _RESIDUAL_FORMS[form] else None for name, make in makers.items()}


def _residual_forward(m: Model, launcher: Callable[..., Any], form: str) -> Any:
    return launcher(m.stream(), **_operands(m, form), eps=EPS, tokens_per_frame=m.per_frame, first_token=0)


def _residual_backward(m: Model, form: str, want: bool) -> Any:
    given = _operands(m, form)
    y, gate, scale, weight = (given[name] for name in ("y", "gate", "scale", "weight"))
    wanted = (want and gate is not None, want and scale is not None, want and weight is not None)
    return residual_norm.residual_norm_backward(
        *(None if y is None else m.stream(), m.stream(), m.stream(), y if wanted[0] else None),
        *(gate, scale, weight, m.stats(), m.stats(), *wanted, m.per_frame, 0),
    )


def _gated_residual(m: Model, gated: bool) -> Any:
    gate = m.modulation(5) if gated else None
    return residual_norm.gated_residual_forward(m.stream(), m.stream(), gate, m.per_frame, 0)


def _gated_residual_backward(m: Model, want: bool) -> Any:
    y = m.stream() if want else None
    return residual_norm.gated_residual_backward(m.stream(), y, m.modulation(5), want, m.per_frame, 0)


def _rms_norm(m: Model, packed: bool) -> Any:
    x = m.empty(1, m.tokens, 2, m.dim)[:, :, 0] if packed else m.stream()
    return norm.rms_norm_forward(x, m.row(), EPS)


def _rms_norm_backward(m: Model, want: bool) -> Any:
    return norm.rms_norm_backward(m.stream(), m.stream(), m.row(), m.stats(), want)


def _qk_rope_arguments(m: Model) -> tuple[Any, ...]:
    packed = m.empty(1, m.tokens, 3, m.heads, m.head_dim)
    angles = m.empty(max(m.grid), m.head_dim // 2, dtype=torch.float32)
    return packed[:, :, 0], packed[:, :, 1], m.row(), m.row(), angles, angles, m.grid, 0


def _qk_rope(m: Model, inplace: bool) -> Any:
    return qk_rope.qk_rope_forward(*_qk_rope_arguments(m), EPS, inplace)


def _qk_rope_backward(m: Model, want: bool) -> Any:
    gradients = (m.empty(1, m.tokens, m.heads, m.head_dim) for _ in range(2))
    return qk_rope.qk_rope_backward(*gradients, *_qk_rope_arguments(m), m.stats(), m.stats(), want)


def _step(m: Model, guided: bool) -> Any:
    x, v = m.empty(*m.latents, dtype=torch.float32), m.empty(*m.latents)
    return step.guided_euler_step(x, v, v if guided else None, 5.0, m.empty(m.latents[2], dtype=torch.float32))


def _noise_and_target(m: Model) -> Any:
    clean, noise = m.empty(*m.latents), m.empty(*m.latents, dtype=torch.float32)
    return flow.noise_and_target(clean, noise, m.empty(1, m.latents[2], dtype=torch.float32), m.dtype)


def _flow_loss(m: Model, want: bool) -> Any:
    v, target = m.empty(*m.latents), m.empty(*m.latents, dtype=torch.float32)
    return flow.flow_loss_forward(v, target, m.empty(1, m.latents[2], dtype=torch.float32), want)


def _flow_loss_backward(m: Model) -> Any:
    return flow.flow_loss_backward(m.empty(*m.latents), torch.empty((), device="meta"))


def cases() -> Iterator[Case]:
    """Every launcher in the variants that inference and training use."""
    partial = functools.partial
    for form in _RESIDUAL_FORMS:
        for op in ("residual_norm", "residual_norm_fp8"):
            launcher = getattr(residual_norm, f"{op}_forward")
            yield Case(op, form, partial(_residual_forward, launcher=launcher, form=form), fp8=op.endswith("fp8"))
    for want, what in ((False, "frozen tables"), (True, "all gradients")):
        for form in _RESIDUAL_FORMS:
            call = partial(_residual_backward, form=form, want=want)
            yield Case("residual_norm_backward", f"{form}; {what}", call, forward=False)
        yield Case("gated_residual_backward", what, partial(_gated_residual_backward, want=want), forward=False)
        yield Case("rms_norm_backward", what, partial(_rms_norm_backward, want=want), forward=False)
        yield Case("qk_rope_backward", what, partial(_qk_rope_backward, want=want), forward=False)
    for yes in (True, False):
        yield Case("gated_residual", "gate" if yes else "no gate", partial(_gated_residual, gated=yes))
        yield Case("rms_norm", "half of a packed row" if yes else "", partial(_rms_norm, packed=yes))
        yield Case("qk_rope", "in place" if yes else "new tensors", partial(_qk_rope, inplace=yes))
        yield Case("guided_euler_step", "guided" if yes else "no guidance", partial(_step, guided=yes))
    yield Case("noise_and_target", "", _noise_and_target)
    yield Case("flow_loss", "training", partial(_flow_loss, want=True))
    yield Case("flow_loss", "validation", partial(_flow_loss, want=False), forward=False)
    yield Case("flow_loss_backward", "", _flow_loss_backward)
    yield Case("quantize_rows", "", lambda m: fp8.quantize_rows(m.stream()), fp8=True)
    yield Case("gelu_quantize_rows", "", lambda m: fp8.gelu_quantize_rows(m.empty(1, m.tokens, m.ffn)), fp8=True)


# What the VAE asks for between its convolutions: which of x, bias, r and out there are.
_VAE_FORMS = {
    "out": "",
    "bias: out": "bias",
    "bias, x: r, out": "bias x r",
    "r": "r only",
    "bias, x: r": "bias x r only",
    "bias: r, out of an upsampling": "bias r upsampled",
    "bias, x: r, out; no SiLU": "bias x r identity",
}


def _vae_act(stage: Stage, form: str) -> Any:
    words = _VAE_FORMS[form].split()

    def wanted(name: str, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if name in words else None

    vae_act.vae_act_(
        stage.phases() if "upsampled" in words else stage.pixels(),
        *(None if "only" in words else stage.row(), wanted("x", stage.pixels), wanted("bias", stage.row)),
        *(wanted("r", stage.pixels), None if "only" in words else stage.pixels(past=2)),
        *("identity" not in words, "upsampled" in words),
    )


def stage_cases() -> Iterator[Case]:
    """The VAE's one kernel in the forms that it is asked for."""
    for form in _VAE_FORMS:
        yield Case("vae_act", form, functools.partial(_vae_act, form=form))


def cases_of(model: Model | Stage) -> Iterator[Case]:
    return stage_cases() if isinstance(model, Stage) else cases()


class _NoGPU:
    """Replaces Triton's driver: says which GPU to compile for, and runs nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # a key of Triton's caches

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `arch` and launches nothing; the list gets the results."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("under TRITON_INTERPRET=1 there is no compiler: run this in a process without it")
    launches: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(compiled)
        return compiled

    driver.set_active(_NoGPU(arch))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():  # else there is no driver to go back to
            driver.reset_active()


@dataclass(frozen=True)
class Resources:
    """What a kernel takes and does. `narrow`: accesses to global memory of 1 or 2 bytes."""

    registers: int
    spills: int
    shared: int
    loads_16: int
    stores_16: int
    narrow: int
    instructions: int


def resources(compiled: Any) -> Resources:
    """Read from the machine code with Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {what: int(number) for what, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)

    def count(pattern: str) -> int:
        return sum(1 for opcode in opcodes if re.match(pattern, opcode))

    return Resources(
        registers=used["REG"],
        spills=count(r"(LDL|STL)\b") or used["STACK"] or used["LOCAL"],
        shared=compiled.metadata.shared,
        loads_16=count(r"LDG\b.*\.(128|256)"),
        stores_16=count(r"STG\b.*\.(128|256)"),
        narrow=count(r"(LDG|STG)\b.*\.[US](8|16)\b"),
        instructions=len(opcodes) - count("NOP"),
    )


def measure(
    archs: Iterable[int] = ARCHS, models: Iterable[str] = (*MODELS, *STAGES), ops: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """One record for each kernel of an op: what launches it first, its warps, its `Resources`. No
    ops: all.

    A case that does not compile gives a record with the compiler's `error` instead.
    """
    wanted, found, failed, seen = set(ops), [], [], set()
    for arch, name in itertools.product(archs, models):
        model = STAGES[name] if name in STAGES else MODELS[name]
        for case in cases_of(model):
            if (wanted and case.op not in wanted) or (case.fp8 and arch < 89):
                continue
            about = {"op": case.op, "variant": case.variant, "model": name, "arch": arch}
            try:
                with compiling(arch) as launches:
                    case.call(model)
            except (TritonError, RuntimeError) as error:  # passes of the compiler raise plain RuntimeErrors
                failed.append(about | {"error": f"{type(error).__name__}: {error}"})
                continue
            if not launches:
                raise RuntimeError(f"{case.op} ({case.variant}) launched no kernel")
            for number, compiled in enumerate(dict.fromkeys(launches)):
                if (key := (name, case.op, compiled)) in seen:  # by another variant
                    continue
                seen.add(key)
                record = about | {
                    "launch": number,  # of this case
                    "kernel": compiled.metadata.name,
                    "dim": model.dim,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "forward": case.forward,
                    "fp8": case.fp8,
                    "warps": compiled.metadata.num_warps,
                }
                found.append((record, compiled))
    kernels = list(dict.fromkeys(compiled for _, compiled in found))  # variants share some
    with ThreadPoolExecutor() as pool:  # most of the time goes to the disassembler, a process of its own
        read = dict(zip(kernels, pool.map(resources, kernels), strict=True))
    return [record | asdict(read[compiled]) for record, compiled in found] + failed


def faults(record: dict[str, Any]) -> list[str]:
    """Why a kernel would be slow or not launch: spills, shared memory, registers of one block."""
    if "error" in record:
        return [f"does not compile: {record['error'].strip().splitlines()[-1]}"]
    # Registers are handed out to a warp in units of 256.
    block = -(-record["registers"] * 32 // 256) * 256 * record["warps"]
    limit = SHARED_LIMIT[record["arch"]]
    found = {
        f"{record['spills']} spills": record["spills"] > 0,
        f"{record['shared']} bytes of shared memory, of {limit}": record["shared"] > limit,
        f"{block} registers a block, of {REGISTER_FILE}": block > REGISTER_FILE,
    }
    return [what for what, wrong in found.items() if wrong]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line per kernel, variant and model; registers for each GPU, else the maximum."""
    records = [record for record in records if "error" not in record]
    archs = sorted({record["arch"] for record in records})
    lines = [
        f"| kernel | op: variant | model | warps | registers, sm_{'/'.join(map(str, archs))} | spills | shared, B "
        "| 16-byte access | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("kernel", "op", "variant", "model", "launch"))
        groups.setdefault(key, {})[record["arch"]] = record
    for (kernel, op, variant, model, _), group in groups.items():
        warps, spills, shared, count = (
            max(r[name] for r in group.values()) for name in ("warps", "spills", "shared", "instructions")
        )
        registers = " / ".join(str(group[arch]["registers"]) if arch in group else "-" for arch in archs)
        wide = [what for what in ("loads", "stores") if all(r[f"{what}_16"] for r in group.values())]
        what = f"{op}: {variant}" if variant else op
        cells = (kernel, what, model, warps, registers, spills, shared, ", ".join(wide) or "none", count)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU and show what it takes.")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--model", action="append", choices=(*MODELS, *STAGES), help="default: all")
    parser.add_argument("--op", action="append", default=[], help="default: all")
    options = parser.parse_args()
    records = measure(options.arch or ARCHS, options.model or (*MODELS, *STAGES), options.op)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(table(records))
    bad = [(r, found) for r in records if (found := faults(r))]
    for r, found in bad:
        where = f"{r['op']}: {r['variant']}, {r['model']}, sm_{r['arch']}"
        print(f"{r.get('kernel', 'kernel')} ({where}): {'; '.join(found)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
