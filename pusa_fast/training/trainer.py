"""FAFM training of a LoRA or of all weights: the loop (paper section 3.3; spec sections 5.2, 5.3).

A step: clips with a level per frame -> velocity -> weighted loss -> gradient -> AdamW. Everything
random is a function of the seed and the step, so a run that was killed goes on as if it was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pusa_fast.attention import resolve
from pusa_fast.data.durable import write_text
from pusa_fast.data.lock import alone
from pusa_fast.data.store import LatentStore
from pusa_fast.device import out_of_memory, resolve_device
from pusa_fast.model.dit import WanDiT
from pusa_fast.model.linear import add_lora
from pusa_fast.training import adapters, fafm, flops, metrics, optim
from pusa_fast.training.config import TrainConfig, dump_config
from pusa_fast.training.data import Batch, TrainingData, validation_batches
from pusa_fast.training.memory import save_memory
from pusa_fast.training.parallel import World, accumulating, distribute, gathered, joined
from pusa_fast.training.preflight import check, check_clips, check_encoders
from pusa_fast.training.saved import Checkpoints
from pusa_fast.training.stop import Stop, stop_requests
from pusa_fast.training.validation import Previews
from pusa_fast.weights import checkpoint, files, keymap, load_dit
from pusa_fast.weights.pretrained import ModelFiles


@dataclass(frozen=True)
class Outcome:
    """What `train` did. `weights`: the file that it wrote; None where it stopped before the end.

    `signal`: the one that stopped it.
    """

    step: int
    weights: Path | None
    signal: int | None = None


def train(config: TrainConfig) -> Outcome:
    """Train to the last step. SIGTERM and SIGINT stop it with a checkpoint, and it can go on.

    Raises ValueError and OSError for what cannot work, before the model is loaded;
    FloatingPointError where the loss is not finite, naming the clips. Checkpoints always stay.
    """
    model, store = check(config)
    with joined(resolve_device(config.device)) as world, ExitStack() as stack:

        def first() -> None:
            config.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(config.out))
            check_encoders(config, store, model)

        world.first_does(first)
        return Trainer(config, model, store, world).run()


def export_run(config: TrainConfig) -> Outcome:
    """Write the weights of a run's newest checkpoint, as `train` at its end. Raises ValueError."""
    found = check(config)
    with joined(resolve_device(config.device)) as world:
        trainer = Trainer(config, *found, world)
        if not trainer.step:
            raise ValueError(f"{config.out} holds no checkpoint: train first")
        return Outcome(trainer.step, trainer.export())


class Trainer:
    """One run of `config` in this process of `world`. `dit` is trained; `step` counts steps done.

    `base`: a transformer to train in place of the model's, in its dtype and on its device.
    """

    def __init__(
        self, config: TrainConfig, model: ModelFiles, store: LatentStore, world: World, base: WanDiT | None = None
    ) -> None:
        self.config, self.world, self.store = config, world, store
        shift = config.objective.shift or float(model.defaults["shift"])
        self.shift, self.sampling = shift, config.sampling(shift)
        dit_config = base.config if base is not None else checkpoint.read_config(checkpoint.DIT, model.dit)
        self.data = TrainingData(
            store, self.sampling, batch_size=config.batch_size, accumulate=config.accumulate, seed=config.seed,
            patch=dit_config.patch_size, caption_dropout=config.data.caption_dropout,
            held_out=config.data.validation_clips, rank=world.rank, world=world.size,
        )  # fmt: skip
        self.dtype = config.dtype_on(world.device)
        resolve(config.attention, world.device, self.dtype, grad=True)
        self._sharded = config.parallel == "fsdp" and world.size > 1
        if self._sharded and config.optim.name == "muon":
            raise ValueError("optim.name muon needs whole matrices: use parallel ddp, or adamw")
        check_clips(store, dit_config)
        weights = "given" if base is not None else files.fingerprint(model.dit, files.DIT)
        identity = {**config.identity(), "clips": store.fingerprint, "weights": weights, "dtype": str(self.dtype)}
        self.checkpoints = Checkpoints(config.out, identity, config.checkpoints.keep, world)
        # With a LoRA the base is frozen in the dtype it is used in. Else it is the float32 masters.
        self._weight_dtype = self.dtype if config.lora else torch.float32
        self.dit = base or load_dit(model.dit, device=world.device, dtype=self._weight_dtype)
        _prepare(self.dit, config, fresh=self.checkpoints.newest() is None)
        save_memory(self.dit, config.memory.checkpointing, config.memory.offload)
        self.forward = distribute(self.dit, config.parallel, world, None if config.lora else self.dtype)
        self._autocast = self._weight_dtype is not self.dtype and not self._sharded
        named = {name: p for name, p in self.dit.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.optimizers = optim.build_optimizers(named, config.optim)
        self.average = optim.Average(named, config.optim.ema_decay) if config.optim.ema_decay else None
        found = self.checkpoints.restore(self.dit, self.optimizers, self.average)
        self.step = 0 if found is None else int(found["step"])
        if self.step > config.steps:
            past = f"{config.out} is at step {self.step}, past steps {config.steps}"
            raise ValueError(f"{past}: raise steps, or give another out")
        self.previews = Previews(config, model, store, world)
        self.peak = metrics.peak_flops(world.device)

    def run(self) -> Outcome:
        config = self.config
        if self.world.is_first:
            write_text(config.out / "config.yaml", dump_config(config))
        log = metrics.Metrics(config, self.step) if self.world.is_first else None
        saved, loss, weights = self.step, None, None
        with stop_requests() as stop, closing(self.data.steps(self.step)) as steps:
            try:
                clock = time.perf_counter()
                while self.step < config.steps and not stop.agreed(self.world):
                    row = self.train_step(next(steps), stop, clock)
                    if row is None:
                        break
                    if log is not None:
                        log.write(row)
                        self._say(row)
                    checked = _due(self.step, config.validate_every, config.steps)
                    loss = self.validate(log) if checked else None
                    samples = checked and bool(config.validation.samples)
                    if samples or _due(self.step, config.checkpoints.every, config.steps) or self._is_best(loss):
                        self._save(loss)
                        saved = self.step
                    if samples:  # last, so that nothing that fails in them costs a step
                        self.preview()
                    clock = time.perf_counter()
                if saved != self.step:
                    self._save(loss)
            finally:
                if log is not None:
                    log.close()
            if self.step >= config.steps:
                weights = self.export()
        return Outcome(self.step, weights, stop.received)

    def train_step(
        self, parts: list[Batch], stop: Stop | None = None, clock: float | None = None
    ) -> dict[str, Any] | None:
        """One optimiser step over this process's share of a batch. Returns its row of metrics.

        `clock`: when the step began (None: now). A `stop` between two parts drops the step, which
        will be the same when it is taken again, and returns None. Raises OutOfMemory with what
        helps, and FloatingPointError where the loss is not finite.
        """
        with out_of_memory("train", f"at step {self.step + 1}"):
            return self._step(parts, stop, time.perf_counter() if clock is None else clock)

    def _step(self, parts: list[Batch], stop: Stop | None, start: float) -> dict[str, Any] | None:
        config, device = self.config, self.world.device
        optim.set_rate(self.optimizers, optim.rate(self.step, config.steps, config.optim))
        self._drop_gradients()
        frames: list[Tensor] = []
        total, levels = torch.zeros((), device=device), torch.zeros(2, 4, dtype=torch.float64, device=device)
        for number, batch in enumerate(parts, 1):
            if number > 1 and stop is not None and stop.agreed(self.world):
                return None
            with accumulating(self.forward, last=number == len(parts)):
                loss, errors, sigma = self.loss(batch)
                torch.autograd.backward(loss / len(parts))
            total += loss.detach() / len(parts)
            levels += metrics.level_errors(sigma, errors)
            frames.append(errors)
        norm = _whole(optim.clip(self.parameters, config.optim.clip_norm))
        sums = self.world.sum(torch.cat([total.double()[None], levels.flatten()]))
        mean = float(sums[0]) / self.world.size
        if not math.isfinite(mean) or not math.isfinite(float(norm)):
            raise self._no_number(mean, float(norm), parts, frames)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the optimiser's time belongs to this step
        return self._row(mean, float(norm), sums[1:].view(2, 4), parts, time.perf_counter() - start)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted loss, frame errors [B, F], levels [B, F]) of the model on one batch."""
        device = self.world.device
        clean, noise, sigma, context = (t.to(device) for t in (batch.latents, batch.noise, batch.sigma, batch.context))
        noised, timestep, target = fafm.noised(clean, noise, sigma, self._weight_dtype)
        with torch.autocast(device.type, self.dtype) if self._autocast else nullcontext():
            velocity = self.forward(noised, timestep, context)
        loss, errors = fafm.loss(velocity, target, sigma, self.config.objective.weighting, self.shift)
        return loss, errors, sigma

    def validate(self, log: metrics.Metrics | None) -> float | None:
        """Loss on held-out clips, with averaged weights if there are any. None without clips."""
        with self._averaged(), out_of_memory("train", f"at step {self.step}, in validation"):
            loss = self._validation_loss()
        if log is not None and loss is not None:
            log.write({"step": self.step, "validation_loss": loss})
            print(f"step {self.step}/{self.config.steps}: validation loss {loss:.5f}", flush=True)
        return loss

    def preview(self) -> None:
        """Make the sample clips, with averaged weights if there are any. Raises OutOfMemory."""
        self._drop_gradients()  # as the next step does first
        held = optim.held_bytes(self.optimizers, self.average)
        with out_of_memory("validation", f"at step {self.step}"), self._averaged(), gathered(self.dit):
            self.previews.make(self.dit, self.step, held)

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        def mine(number: int) -> bool:
            """Of a sharded model every process takes part in every forward."""
            return self._sharded or number % self.world.size == self.world.rank

        count, total = self.config.data.validation_clips, torch.zeros(2, dtype=torch.float64)
        for batch in validation_batches(self.store, count, self.data.share, self.sampling, self.config.seed, mine):
            loss, _, _ = self.loss(batch)
            total += torch.tensor([float(loss) * len(batch.clips), len(batch.clips)], dtype=torch.float64)
        total = self.world.sum(total)
        return float(total[0] / total[1]) if count else None

    def export(self) -> Path:
        """Write the trained weights, or their average: a LoRA in the released style, or all."""
        full, keep = self.config.lora is None, self.world.is_first  # all gather, one keeps
        path = self.config.out / ("dit.safetensors" if full else "lora.safetensors")
        with self._averaged():
            if not full:
                updates = adapters.trained_updates(self.dit, _whole, keep)
                if keep:
                    adapters.write_lora(path, updates)
            else:
                pairs = ((name, _whole(tensor)) for name, tensor in self.dit.state_dict().items())
                state = {name: tensor.cpu() for name, tensor in pairs if keep}
                if keep:
                    checkpoint.save(path, keymap.unpack(state), self.dit.config)
        self.world.barrier()
        return path

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.average is not None:
            self.average.swap()
        self.dit.weights_version += 1
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()

    def _is_best(self, loss: float | None) -> bool:
        """Whether this is the lowest validation loss so far. The first process has the record."""
        best = self.checkpoints.best() if self.world.is_first else None
        return loss is not None and bool(self.world.gather(best is None or loss < best["loss"])[0])

    def _save(self, loss: float | None) -> None:
        self.checkpoints.save(self.step, self.dit, self.optimizers, self.average, {"processes": self.world.size}, loss)

    def _row(self, loss: float, norm: float, levels: Tensor, parts: list[Batch], seconds: float) -> dict[str, Any]:
        tokens, work = (
            sum(f(self.dit.config, b.latents.shape, b.context.shape[1]) for b in parts)
            for f in (flops.tokens, flops.training_step(self.config))
        )
        lr = self.optimizers[-1].param_groups[0]["lr"]
        row: dict[str, Any] = {"step": self.step, "loss": loss, "gradient_norm": norm, "lr": lr}
        row |= {f"error_level_{q + 1}of4": float(levels[0, q] / levels[1, q]) for q in range(4) if levels[1, q]}
        row |= {"seconds": round(seconds, 4), "tokens_per_second": round(tokens * self.world.size / seconds, 1)}
        if self.peak is not None:
            row["mfu"] = round(work / seconds / self.peak, 4)
        row["memory_gib"] = round(metrics.peak_memory(self.world.device) / 2**30, 3)
        return row

    def _say(self, row: Mapping[str, Any]) -> None:
        if self.step % self.config.logging.every == 0 or self.step == self.config.steps:
            left = (self.config.steps - self.step) * row["seconds"]
            print(
                f"step {self.step}/{self.config.steps}: loss {row['loss']:.5f}, gradient {row['gradient_norm']:.3g}, "
                f"{row['seconds']:.3g} s, {row['tokens_per_second']:.4g} tokens/s, about {left / 60:.1f} min left",
                flush=True,
            )

    def _no_number(self, loss: float, norm: float, parts: list[Batch], frames: list[Tensor]) -> FloatingPointError:
        """Names the clips of all processes with errors that are not finite, or else all clips."""
        clips = [f"{clip.source} ({clip.caption!r})" for batch in parts for clip in batch.clips]
        bad = [clip for clip, own in zip(clips, torch.cat(frames).isfinite().all(1).tolist(), strict=True) if not own]
        everyone = self.world.gather((bad, clips))
        named = ", ".join([c for own, _ in everyone for c in own] or [c for _, own in everyone for c in own])
        steps = self.checkpoints.steps()
        change = "lower optim.lr, set optim.clip_norm, or leave these clips out"
        last, start = "there is no checkpoint yet", "dit" if self.config.lora is None else "lora.start"
        if steps:  # made with the settings that failed
            last = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}"
            change += (
                "; with other settings a run cannot go on, but begin from it: pusa-fast export "
                f"{self.config.out} --out start.safetensors --dtype float32, then set {start}=start.safetensors and "
                "another out"
            )
        wrong = f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm} on {named}"
        return FloatingPointError(f"{wrong}; {last}. To mend it, {change}")


def _prepare(dit: WanDiT, config: TrainConfig, fresh: bool) -> None:
    """Make the trained parameters float32 and trainable: adapters on a frozen base, or all.

    `fresh`: no checkpoint will be loaded.
    """
    lora = config.lora
    dit.attention_backend = config.attention
    if lora is None:
        dit.requires_grad_(True)
        return
    devices = [dit.device] if dit.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        add_lora(dit, lora.rank, lora.alpha, lora.targets, lora.init)
    if fresh and lora.start is not None:
        adapters.start_from(dit, lora.start)


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def _due(step: int, every: int, steps: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)
