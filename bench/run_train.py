"""`bench train`: a LoRA training step against the reference's in plain torch, on the same weights.

On the CPU: nano at its own batch size, interleaved in one run; both do noising, forward, loss,
backward, clipping and AdamW. On CUDA: 14B shapes with random weights, one clip of 81 frames, the
published recipe; only our trainer, with peak memory and utilisation.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from bench.harness import Options, Recorder
from bench.memory import peak_bytes
from bench.reference_dit import reference_dit
from bench.timing import Run, measure, ratio, significant, spread
from pusa_fast import DiTConfig, WanDiT
from pusa_fast.config import MODELS
from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.model.linear import LORA_TARGETS, adapters
from pusa_fast.testing import relative_error
from pusa_fast.training import fafm, flops, metrics
from pusa_fast.training.config import TrainConfig, parse_config
from pusa_fast.training.data import Batch
from pusa_fast.training.parallel import World
from pusa_fast.training.plan import plan_step
from pusa_fast.training.trainer import Trainer
from pusa_fast.weights import load_dit
from pusa_fast.weights.pretrained import find_model

TARGET = 1.3  # on the CPU, over the reference's formulation
GPU_TARGETS = {"seconds": 10.0, "peak_gib": 130.0}  # rank 512, 14B, 480p
LATENTS = {"480p": (16, 21, 60, 104), "720p": (16, 21, 90, 160)}
_LR, _CLIP = 1e-4, 1.0


def run(options: Options, recorder: Recorder) -> None:
    (_run_cuda if recorder.device.type == "cuda" else _run_cpu)(options, recorder)


def _store(folder: Path, shape: tuple[int, ...], text: int, width: int, clips: int) -> LatentStore:
    """Random clips and captions."""
    draw = torch.Generator().manual_seed(3)
    about = {"vae": "random", "text": "random", "channels": shape[0], "text_dim": width, "text_len": text}
    with StoreWriter(folder, about) as writer:
        for number in range(clips):
            rows = torch.randn(text // 2 + 1, width, generator=draw)
            writer.add(
                str(number), torch.randn(shape, generator=draw), rows, source=f"random {number}", caption="random"
            )
    return LatentStore(folder)


def _config(folder: Path, out: Path, batch: int, rank: int, **more: Any) -> TrainConfig:
    return parse_config({
        "data": {"path": folder}, "out": out, "batch_size": batch, "accumulate": 1, "steps": 1000,
        "lora": {"rank": rank}, "optim": {"lr": _LR, "clip_norm": _CLIP}, "objective": {"shift": 5.0}, **more,
    })  # fmt: skip


def _run_cpu(options: Options, recorder: Recorder) -> None:
    batch, rank = (4, 8) if options.quick else (32, 32)
    recorder.working_on(f"nano, {batch} clips, rank {rank}")
    files = find_model("nano")
    with tempfile.TemporaryDirectory() as name:
        base = load_dit(files.dit, dtype=torch.float32)
        store = _store(Path(name) / "clips", (16, 5, 8, 8), 24, base.config.text_dim, 2 * batch)
        config = _config(store.folder, Path(name) / "run", batch, rank, memory={"checkpointing": "none"})
        calls = {"reference": _reference_step(base, config)} if importlib.util.find_spec("peft") else {}
        trainer = Trainer(config, files, store, World(recorder.device), base)
        steps = trainer.data.steps(0)
        parts = next(steps)
        steps.close()
        errors = _same_gradients(trainer, parts, *calls["reference"]) if calls else {}
        forwards: dict[str, Callable[[], Any]] = {"pusa": lambda: trainer.train_step(parts)}
        if calls:
            _, step = calls["reference"]
            forwards["reference"] = lambda: step(parts[0])
        seconds = measure(
            {n: Run(call) for n, call in forwards.items()}, recorder.device, 0.5 if options.quick else 60.0,
            min_rounds=2 if options.quick else 15, max_rounds=60, warmup=2,
        )  # fmt: skip
        peaks = {n: peak_bytes(call, recorder.device) for n, call in forwards.items()}
        predicted = plan_step(config, trainer.dit.config, (16, 5, 8, 8), 24, recorder.device)
    found: dict[str, Any] = {
        "seconds": {n: spread(values) for n, values in seconds.items()},
        "peak_mib": {n: significant(peak / 2**20) for n, peak in peaks.items()},
        "planned_step_mib": significant((predicted.memory["activations"] + predicted.memory["gradients"]) / 2**20),
        "relative_error": {n: significant(e) for n, e in errors.items()},
    }
    if calls:
        found["speedup"] = ratio(seconds["reference"], seconds["pusa"])
        if not options.quick:
            found["meets"] = {"speedup": found["speedup"] >= TARGET}
    recorder.save(batch=batch, rank=rank, tokens=flops.tokens(trainer.dit.config, (batch, 16, 5, 8, 8), 24), **found)
    lines = [
        [n, f"{s['median']:.3f}", f"{s['p20']:.3f}-{s['p80']:.3f}", str(found["peak_mib"][n])]
        for n, s in found["seconds"].items()
    ]
    recorder.table(
        f"nano, a LoRA step: speedup {found.get('speedup')}", ("formulation", "s", "p20-p80", "peak MiB"), lines
    )


def _reference_step(base: WanDiT, config: TrainConfig) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """The reference's step: PEFT on its transformer, error averaged before weighting, AdamW."""
    from peft import LoraConfig, inject_adapter_in_model

    assert config.lora is not None
    rank = config.lora.rank
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS))
    model: nn.Module = inject_adapter_in_model(settings, reference_dit(base))
    parameters = [p for n, p in model.named_parameters() if p.requires_grad_("lora_" in n).requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.optim.lr)

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = reference_loss(model, batch, 5.0)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        return loss.detach()

    return model, step


def reference_loss(model: Callable[..., Tensor], batch: Batch, shift: float) -> Tensor:
    """The reference's noising, target and weighting in plain torch; one weight per clip."""
    s = batch.sigma[:, None, :, None, None]
    noised, target = (1 - s) * batch.latents + s * batch.noise, batch.noise - batch.latents
    velocity = model(noised, 1000 * batch.sigma, batch.context)
    errors = nnf.mse_loss(velocity.float(), target.float(), reduction="none").mean((1, 2, 3, 4))
    return (errors * fafm.level_weights(batch.sigma, shift).mean(1)).mean()


def _same_gradients(trainer: Trainer, parts: list[Batch], model: nn.Module, step: Any) -> dict[str, float]:
    """Copies our adapters' values to theirs; AssertionError unless loss and gradients agree."""
    ours = dict(_adapter_tensors(trainer))
    theirs = {
        n.replace(".lora_A.default.weight", "/A").replace(".lora_B.default.weight", "/B"): p
        for n, p in model.named_parameters()
        if "lora_" in n
    }
    if ours.keys() != theirs.keys():
        raise AssertionError(f"adapters differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    with torch.no_grad():
        for name, p in theirs.items():
            if name.endswith("/B"):
                ours[name].normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
            p.copy_(ours[name])
    loss, _, _ = trainer.loss(parts[0])
    torch.autograd.backward(loss)
    their_loss = reference_loss(model, parts[0], 5.0)
    torch.autograd.backward(their_loss)
    worst = 0.0
    for name, p in theirs.items():
        mine, own = ours[name].grad, p.grad
        assert mine is not None and own is not None
        worst = max(worst, relative_error(mine, own))
    found = {"loss": relative_error(loss.detach(), their_loss.detach()), "gradient": worst}
    if not (found["loss"] < 1e-5 and found["gradient"] < 1e-3):
        raise AssertionError(f"the two formulations disagree: {found}")
    return found


def _adapter_tensors(trainer: Trainer) -> Any:
    for name, adapter in adapters(trainer.dit):
        yield f"{name}/A", adapter.lora_A
        yield f"{name}/B", adapter.lora_B


def _run_cuda(options: Options, recorder: Recorder) -> None:
    config14 = MODELS["wan2.1-t2v-14b"]
    assert isinstance(config14, DiTConfig)
    size = options.size or "480p"
    if size not in LATENTS:
        raise ValueError(f"--size {size} is not measured: choose from {', '.join(LATENTS)}")
    layers = 4 if options.quick else config14.num_layers
    shape = LATENTS[size]
    dit_config = DiTConfig(config14.dim, config14.ffn_dim, config14.num_heads, layers)
    recorder.working_on(f"14B shapes, {layers} blocks, {size}, rank 512, random weights")
    with tempfile.TemporaryDirectory() as name:
        store = _store(Path(name) / "clips", shape, 512, dit_config.text_dim, 2)
        config = _config(store.folder, Path(name) / "run", 1, 512)
        plan = plan_step(config, dit_config, shape, 512, recorder.device)
        trainer = Trainer(
            config, find_model("nano"), store, World(recorder.device), _random_dit(dit_config, recorder.device)
        )
        steps = trainer.data.steps(0)
        rows = []
        for number in range(2 if options.quick else 6):
            parts = next(steps)
            if number == 1:
                torch.cuda.reset_peak_memory_stats()
            row = trainer.train_step(parts)
            assert row is not None
            rows.append(row)
            recorder.save(size=size, layers=layers, rank=512, rows=rows)
            if recorder.out_of_time:
                break
        steps.close()
    seconds = [row["seconds"] for row in rows[1:]] or [rows[0]["seconds"]]
    work, peak = flops.training_step(config)(dit_config, (1, *shape), 512), metrics.peak_flops(recorder.device)
    found = {
        "seconds": spread(seconds),
        "peak_gib": significant(torch.cuda.max_memory_allocated() / 2**30),
        "planned_gib": significant(plan.peak / 2**30),
    }
    found["mfu"] = significant(work / found["seconds"]["median"] / peak) if peak else None
    found["planned_seconds"] = {where: significant(value) for where, value in plan.seconds.items()}
    if not options.quick and size == "480p":
        found["meets"] = {
            "seconds": found["seconds"]["median"] <= GPU_TARGETS["seconds"],
            "peak_gib": found["peak_gib"] <= GPU_TARGETS["peak_gib"],
        }
    recorder.save(**found)
    recorder.table(
        f"14B, {size}, rank 512",
        ("s a step", "peak GiB", "planned GiB", "MFU"),
        [[f"{found['seconds']['median']:.2f}", str(found["peak_gib"]), str(found["planned_gib"]), str(found["mfu"])]],
    )


def _random_dit(config: DiTConfig, device: torch.device) -> WanDiT:
    """Random bf16 weights at the scale of trained ones, made on the device tensor by tensor."""
    with torch.device("meta"):
        dit = WanDiT(config).to(torch.bfloat16)
    dit = dit.to_empty(device=device)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.fill_(1)
            else:
                p.normal_(std=0.02)
    return dit
