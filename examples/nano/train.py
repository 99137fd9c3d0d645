"""Train the embedded model from nothing, unattended: VAE, text-to-video base, Pusa LoRA.

    python examples/nano/train.py --out mine --run runs/mine          # all three stages, hours on two cores; again after a kill
    python examples/nano/train.py --out trial --run runs/trial --scale 0.01   # a trial of a few minutes

Each stage resumes from its checkpoint in --run. A stage that --out already holds for this seed and plan is taken from
there; a VAE or base that stopped half-way there goes on from those weights (with fresh optimisers). `--export` writes
the weights of an unfinished VAE or base to --out and stops.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import dit
import text
import torch
import vae

from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import lora_state_dict
from pusa_fast.model.vae import WanVAE
from pusa_fast.training import sprites
from pusa_fast.weights import checkpoint, keymap, load_dit, load_vae

ASSETS = Path(__file__).parents[2] / "pusa_fast" / "assets" / "nano"
DEFAULTS = {
    "num_frames": sprites.FRAMES, "height": sprites.SIZE, "width": sprites.SIZE, "fps": 8, "steps": 10,
    "guidance_scale": 3.0, "shift": dit.SHIFT, "negative_prompt": "",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/nano"), help="checkpoints and logs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the model directory (default: the embedded one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of every stage and on the clips")
    parser.add_argument("--threads", type=int, default=dit.threads())
    parser.add_argument("--export", action="store_true", help="write the weights of the newest checkpoint to --out")
    parser.add_argument("--until", choices=("vae", "base", "lora"), default="lora", help="the last stage to run")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error(f"--scale must be above 0, got {args.scale}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.run, args.out, args.seed, args.scale)
    if args.export:
        trainer.export()
    else:
        trainer.run_until(args.until)


class Trainer:
    """Runs the stages in order; what `out` holds is always a state that one can go on from."""

    def __init__(self, run: Path, out: Path, seed: int, scale: float) -> None:
        self.run, self.out, self.seed, self.scale = run, out, seed, scale
        path = out / "model.json"
        done = json.loads(path.read_text())["training"] if path.exists() else {}
        self.stages: dict[str, Any] = done.get("stages", {}) if done.get("seed") == seed else {}

    def run_until(self, last: str) -> None:
        for name in ("vae", "base", "lora"):
            steps = {"vae": vae.steps(self.scale), "base": dit.base_steps(self.scale), "lora": dit.lora_steps(self.scale)}[name]
            done = self.stages.get(name, {}).get("steps", 0)
            if done > steps:
                raise SystemExit(f"{self.out} holds {done} steps of {name}, the plan has {steps}: give another --out, or a larger --scale")
            if done == steps:
                print(f"{name}: {self.out} holds it already ({steps} steps, seed {self.seed}); --out DIR trains another")
            else:
                getattr(self, f"_{name}")()
                self._record(name, steps)
            if name == last:
                return

    def export(self) -> None:
        """Write the newest unfinished stage as it stands in its checkpoint."""
        name = next((n for n in ("base", "vae") if (self.run / f"{n}.pt").exists()), None)
        if name is None:
            raise SystemExit(f"{self.run} holds no checkpoint of a VAE or base: train first")
        saved = torch.load(self.run / f"{name}.pt", weights_only=True)
        if name == "vae":
            model = vae.build(self.seed)
            model.load_state_dict(saved["modules"]["vae"])
            self._save_vae(vae.with_statistics(model, self.seed))
        else:
            parts = dit.build_base(self.seed)
            for part, key in zip(parts, ("dit", "text"), strict=True):
                part.load_state_dict(saved["modules"][key])
            self._save_base(*parts)
        self._record(name, saved["step"])

    def _vae(self) -> None:
        start = self.stages.get("vae", {}).get("steps", 0)
        self._save_vae(vae.train(self.run, self.seed, self.scale, self.load_vae() if start else None, start))

    def _save_vae(self, model: WanVAE) -> None:
        checkpoint.save(self.out / "vae.safetensors", half(model.state_dict()), model.config)

    def _base(self) -> None:
        start = self.stages.get("base", {}).get("steps", 0)
        begun = (self.load_dit(), text.TextStack.load(self.out)) if start else None
        self._save_base(*dit.train_base(self.load_vae(), self.run, self.seed, self.scale, begun, start))

    def _save_base(self, model: WanDiT, stack: text.TextStack) -> None:
        checkpoint.save(self.out / "dit.safetensors", half(keymap.unpack(model.state_dict())), model.config)
        stack.save(self.out)

    def _lora(self) -> None:
        # On the weights as they are shipped, so that the adapter fits their rounding.
        stack = text.TextStack.load(self.out)
        model = dit.train_lora(self.load_dit(), stack, self.load_vae(), self.run, self.seed, self.scale)
        checkpoint.save(self.out / "pusa_lora.safetensors", half(lora_state_dict(model)))

    def load_dit(self) -> WanDiT:
        return load_dit(self.out / "dit.safetensors", dtype=torch.float32)

    def load_vae(self) -> WanVAE:
        return load_vae(self.out / "vae.safetensors", dtype=torch.float32)

    def _record(self, name: str, steps: int) -> None:
        log = (self.run / f"{name}.jsonl").read_text().splitlines()
        self.stages[name] = {"steps": steps, **{k: v for k, v in json.loads(log[-1]).items() if k != "step"}}
        for later in ("base", "lora")[("vae", "base", "lora").index(name) :]:
            self.stages.pop(later, None)  # they were trained on other weights
        model = {
            "name": "nano", "dit": "dit.safetensors", "vae": "vae.safetensors",
            "text": {"encoder": "text_encoder", "tokenizer": "tokenizer", "text_len": text.TEXT_LEN},
            "lora": {"pusa_lora.safetensors": 1.0} if "lora" in self.stages else {}, "defaults": DEFAULTS,
            "training": {"seed": self.seed, "torch": torch.__version__, "threads": torch.get_num_threads(), "stages": self.stages},
        }  # fmt: skip
        part = self.out / "model.json.part"
        part.write_text(json.dumps(model, indent=1) + "\n")
        os.replace(part, self.out / "model.json")


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
