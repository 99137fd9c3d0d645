"""Makes this folder's files, with the commit of its name: `PYTHONPATH=CHECKOUT python make.py`, in
an empty folder.

clips/                 what `prepare` was given: two videos of 9 frames, two pictures, captions
store/                 what it wrote: six clips of two shapes
dit.safetensors        one block of width 12 with random weights
run/                   a run of six steps that SIGTERM stopped in its fourth; checkpoint of step 3
finished/              the LoRA and the metrics of the same run when nothing stops it
made_on.json           on which the last bits of those depend
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pusa_fast import DiTConfig, WanDiT, _native, video
from pusa_fast.training import metrics
from pusa_fast.training.config import load_config
from pusa_fast.training.prepare import prepare
from pusa_fast.training.trainer import train
from pusa_fast.weights import checkpoint, keymap

SETTINGS = """
data: {path: store, caption_dropout: 0.3, validation_clips: 1}
dit: dit.safetensors
device: cpu
steps: 6
batch_size: 4
accumulate: 2
seed: 3
lora: {rank: 2, alpha: 4.0, targets: [self_attn.q, cross_attn.v, ffn.2]}
optim: {lr: 0.01, schedule: cosine, warmup_steps: 2, ema_decay: 0.9, clip_norm: 1.0}
checkpoints: {every: 3, keep: 1}
"""


def frames(count: int, color: tuple[int, int, int]) -> Tensor:
    """A bright bar that moves over a plain colour, [count, 16, 16, 3]."""
    found = torch.tensor(color, dtype=torch.uint8).expand(count, 16, 16, 3).clone()
    for i in range(count):
        found[i, :, i : i + 3] = 250
    return found


def make_clips(folder: Path) -> None:
    folder.mkdir()
    colors = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "grey": (120, 120, 120)}
    for name in ("red", "green"):
        video.write_video(folder / f"{name}.mp4", frames(9, colors[name]), fps=8)
    for name in ("blue", "grey"):
        Image.fromarray(frames(1, colors[name])[0].numpy()).save(folder / f"{name}.png")
    rows = [f"{path.name},a bar on {path.stem}" for path in sorted(folder.iterdir(), reverse=True)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows, ""]))


def stop_after(step: int) -> None:
    write = metrics.Metrics.write

    def stopping(self: metrics.Metrics, row: dict[str, object]) -> None:
        write(self, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    metrics.Metrics.write = stopping  # type: ignore[assignment, method-assign]


def main() -> None:
    torch.set_num_threads(1)
    make_clips(Path("clips"))
    prepare("clips", "store", buckets=["16x16x5", "16x16x1"], clips_per_video=2, device="cpu", shard_clips=4)
    config = DiTConfig(dim=12, ffn_dim=24, num_heads=1, num_layers=1, text_dim=64, freq_dim=8)
    torch.manual_seed(11)
    dit = WanDiT(config)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)  # an untrained head is zero, and so would be every gradient
    checkpoint.save("dit.safetensors", keymap.unpack(dit.state_dict()), config)
    Path("train.yaml").write_text(SETTINGS)
    train(load_config("train.yaml", ["out=whole"]))
    Path("finished").mkdir()
    for name in ("lora.safetensors", "metrics.jsonl"):
        shutil.move(Path("whole", name), "finished")
    shutil.rmtree("whole")
    stop_after(3)
    train(load_config("train.yaml", ["out=run"]))
    Path("train.yaml").unlink()
    processor = Path("/proc/cpuinfo").read_text().splitlines()
    vendor = next(line.split(":")[1].strip() for line in processor if line.startswith("vendor_id"))
    about = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _native.isa(),
        "vendor": vendor,
    }
    Path("made_on.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
