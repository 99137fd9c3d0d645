"""What works on a machine with torch and little else: packages are imported only by what needs
them."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pusa_fast

ROOT = Path(__file__).parents[1]
OPTIONAL = ("av", "ftfy", "pydantic", "diffusers", "peft", "accelerate", "typer", "rich")
# What these packages are for: the command line, settings of a training run and the loop that writes
# them down.
NEED_THEM = ("pusa_fast.cli", "pusa_fast.commands", "pusa_fast.training.config", "pusa_fast.training.trainer")
BENCH = ("ops", "attention", "dit", "vae", "e2e")


def run_without(packages: tuple[str, ...], source: str) -> str:
    """Output of a fresh interpreter in which every import of `packages` fails."""
    source = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n{source}"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> list[str]:
    """Every module of the package that has to work without the optional packages."""
    names = [m.name for m in pkgutil.walk_packages(pusa_fast.__path__, "pusa_fast.")]
    return [name for name in names if not name.startswith(NEED_THEM) and not name.startswith("pusa_fast.kernels.")]


def test_the_modules_are_seen() -> None:
    assert {"pusa_fast.pipeline", "pusa_fast.video", "pusa_fast.model.text", "pusa_fast.training.optim"} <= {*modules()}


def test_modules_import_without_optional_packages_and_load_nothing_heavy() -> None:
    source = f"""
import importlib
for name in {modules()!r}:
    importlib.import_module(name)
print(*sorted({{"triton", "transformers", "torch._dynamo"}} & set(sys.modules)))
"""
    assert run_without(OPTIONAL, source) == ""


def test_a_clip_is_made_without_optional_packages(tmp_path: Path) -> None:
    """From embeddings and a picture, with random weights, to frames and PNGs."""
    source = f"""
import torch
from PIL import Image
from pusa_fast import Condition, DiTConfig, Pipeline, VAEConfig, WanDiT, WanVAE, video
dit = WanDiT(DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, freq_dim=8))
pipe = Pipeline(dit=dit, vae=WanVAE(VAEConfig(base_dim=4)))
picture = Condition(Image.new("RGB", (32, 32)))
size = dict(num_frames=5, height=32, width=32, steps=2, guidance_scale=1.0, shift=5.0)
frames = pipe(prompt_embeds=torch.randn(3, 8), conditions=[picture], **size)
video.write_video({str(tmp_path / "clip")!r} + "/", frames, 16)
print(torch.equal(video.read_video({str(tmp_path / "clip")!r}), frames), *frames.shape)
"""
    assert run_without(OPTIONAL, source) == "True 5 32 32 3"


def test_measurements_import_without_optional_packages() -> None:
    """`bench` itself shows progress with rich."""
    imports = ", ".join(f"bench.run_{name}" for name in BENCH)
    run_without(tuple(p for p in OPTIONAL if p != "rich"), f"import {imports}")
