"""Train the embedded model from scratch: VAE, text encoder, clips, text-to-video base, Pusa LoRA.

    python examples/nano/train.py --out mine --run runs/mine     # hours; repeat it after a kill
    python examples/nano/train.py --out try --run runs/try --scale 0.01   # a few minutes

Each stage resumes from its checkpoint in --run. A stage that --out already holds for this seed and
step count is not repeated; an unfinished VAE or base in --out is trained for the remaining steps,
with new optimisers. `--export` writes the weights of an unfinished VAE or base to --out and stops.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import dit
import latents
import launch
import text
import torch
import vae
from safetensors.torch import load_file

from pusa_fast.data import sprites
from pusa_fast.data.durable import write_text
from pusa_fast.model.vae.model import WanVAE
from pusa_fast.training.config import TrainConfig
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.trainer import Outcome, export_run
from pusa_fast.weights import checkpoint, keymap, load_dit, load_vae
from pusa_fast.weights.files import save

ASSETS = Path(__file__).parents[2] / "pusa_fast" / "assets" / "nano"
DEFAULTS = {
    "num_frames": sprites.FRAMES, "height": sprites.SIZE, "width": sprites.SIZE, "fps": 8, "steps": 10,
    "guidance_scale": 3.0, "shift": dit.SHIFT, "negative_prompt": "",
}  # fmt: skip
STAGES = {"vae": vae.steps, "text": text.steps, "base": dit.base_steps, "lora": dit.lora_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/nano"), help="checkpoints and logs (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="the model directory (default: the embedded one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of every stage and on the clips")
    parser.add_argument(
        "--threads",
        type=int,
        default=dit.threads(),
        help="for the VAE and text encoder; base and LoRA use as many processes",
    )
    parser.add_argument("--export", action="store_true", help="write the weights of the newest checkpoint to --out")
    parser.add_argument("--until", choices=tuple(STAGES), default="lora", help="the last stage to run")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error(f"--scale must be above 0, got {args.scale}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    nano = Nano(args.run, args.out, args.seed, args.scale)
    if args.export:
        nano.export()
    else:
        nano.run_until(args.until)


class Nano:
    """Runs the stages in order; `out` always holds a state to continue from."""

    def __init__(self, run: Path, out: Path, seed: int, scale: float) -> None:
        self.run, self.out, self.seed, self.scale = run, out, seed, scale
        path = out / "model.json"
        done = json.loads(path.read_text())["training"] if path.exists() else {}
        self.stages: dict[str, Any] = done.get("stages", {}) if done.get("seed") == seed else {}

    def run_until(self, last: str) -> None:
        for name, plan in STAGES.items():
            steps, done = plan(self.scale), self.stages.get(name, {}).get("steps", 0)
            if done > steps:
                raise SystemExit(
                    f"{self.out} holds {done} steps of {name}, above {steps}: give another --out or a larger --scale"
                )
            if done == steps:
                print(
                    f"{name}: {self.out} holds it already ({steps} steps, seed {self.seed}); --out DIR trains another"
                )
            else:
                self._record(name, steps, getattr(self, f"_{name}")(done))
            if name == last:
                return

    def export(self) -> None:
        """Write the base, or else the VAE, from its newest checkpoint."""
        start = self.stages.get("base", {}).get("steps", 0)
        if (self._base_run(start) / "checkpoints").is_dir():
            done = export_run(self._base_config(start))
            self._record("base", start + done.step, self._save_base(done, start))
            return
        if not (self.run / "vae.pt").exists():
            raise SystemExit(f"{self.run} holds no checkpoint of a VAE or base: train first")
        saved = torch.load(self.run / "vae.pt", weights_only=True)
        model = vae.build(self.seed)
        model.load_state_dict(saved["modules"]["vae"])
        self._save_vae(vae.with_statistics(model, self.seed))
        self._record("vae", saved["step"], _last(self.run / "vae.jsonl"))

    def _vae(self, start: int) -> dict[str, Any]:
        self._save_vae(vae.train(self.run, self.seed, self.scale, self._load_vae() if start else None, start))
        return _last(self.run / "vae.jsonl")

    def _save_vae(self, model: WanVAE) -> None:
        checkpoint.save(self.out / "vae.safetensors", half(model.state_dict()), model.config)

    def _text(self, start: int) -> dict[str, Any]:
        text.train(self.run, self.seed, self.scale).save(self.out)
        return _last(self.run / "text.jsonl")

    def _clips(self) -> Path:
        return latents.prepare(self.run, self.out, self.seed, max(2 * dit.BATCH, round(latents.CLIPS * self.scale)))

    def _base(self, start: int) -> dict[str, Any]:
        self._describe()
        return self._save_base(_finished(launch.run(self._base_config(start), dit.processes())), start)

    def _base_run(self, start: int) -> Path:
        return self.run / f"base-from-{start}"

    def _base_config(self, start: int) -> TrainConfig:
        """From scratch, or from the weights in `out` after `start` steps, in another clip order."""
        first = self._base_run(start).with_suffix(".safetensors")
        if not first.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            if start:
                shutil.copyfile(self.out / "dit.safetensors", first)
            else:
                dit.write_untrained(first, self.seed)
        config = dit.base_config(self.out, first, self._clips(), self._base_run(start), self.seed + start, self.scale)
        return config.model_copy(update={"steps": config.steps - start})

    def _save_base(self, done: Outcome, start: int) -> dict[str, Any]:
        assert done.weights is not None
        model = load_dit(done.weights)
        checkpoint.save(self.out / "dit.safetensors", half(keymap.unpack(model.state_dict())), model.config)
        figures = _figures(self._base_run(start))
        figures["seconds"] += self.stages.get("base", {}).get("seconds", 0.0)
        return figures

    def _lora(self, start: int) -> dict[str, Any]:
        # On the rounded weights that are shipped, so that the adapter fits them.
        config = dit.lora_config(self.out, self._clips(), self.run / "lora", self.seed, self.scale)
        done = _finished(launch.run(config, dit.processes()))
        assert done.weights is not None
        save(self.out / "pusa_lora.safetensors", half(load_file(done.weights)))
        return _figures(self.run / "lora")

    def _load_vae(self) -> WanVAE:
        return load_vae(self.out / "vae.safetensors", dtype=torch.float32)

    def _record(self, name: str, steps: int, figures: dict[str, Any]) -> None:
        self.stages[name] = {"steps": steps, **figures}
        for later in list(STAGES)[list(STAGES).index(name) + 1 :]:
            self.stages.pop(later, None)  # they were trained on other weights
        self._describe()

    def _describe(self) -> None:
        model = {
            "name": "nano", "dit": "dit.safetensors", "vae": "vae.safetensors",
            "text": {"encoder": "text_encoder", "tokenizer": "tokenizer", "text_len": text.TEXT_LEN},
            "lora": {"pusa_lora.safetensors": 1.0} if "lora" in self.stages else {}, "defaults": DEFAULTS,
            "training": {
                "seed": self.seed, "torch": torch.__version__, "threads": torch.get_num_threads(),
                "stages": self.stages,
            },
        }  # fmt: skip
        if not (self.out / "dit.safetensors").exists() and "text" in self.stages:
            dit.write_untrained(self.out / "dit.safetensors", self.seed)  # a model folder must be complete
        write_text(self.out / "model.json", json.dumps(model, indent=1) + "\n")


def _finished(done: Outcome) -> Outcome:
    if done.weights is None:
        raise SystemExit(f"stopped after {done.step} steps: run the same command again to continue")
    return done


def _last(log: Path) -> dict[str, Any]:
    """The last row that a stage logged, without its step."""
    row: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    row.pop("step")
    return row


def _figures(run: Path) -> dict[str, Any]:
    """Seconds of all steps, mean loss of the last hundred, and the last validation loss."""
    rows = read_metrics(run)
    steps = [row for row in rows if "seconds" in row]
    losses = [row["loss"] for row in steps[-100:]]
    checked = [row["validation_loss"] for row in rows if "validation_loss" in row]
    found = {"seconds": round(sum(row["seconds"] for row in steps), 1), "loss": sum(losses) / len(losses)}
    return {**found, **({"validation_loss": checked[-1]} if checked else {})}


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
