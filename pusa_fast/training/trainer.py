"""FAFM training of a LoRA or of all weights: the loop, and what surrounds a step (paper section 3.3; spec sections 5.2, 5.3).

A step: clips at levels of their own per frame -> velocity -> weighted loss -> gradient -> AdamW. Everything random is a function
of the seed and the step, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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
from pusa_fast.training.validation import Previews
from pusa_fast.weights import checkpoint, keymap, load_dit
from pusa_fast.weights.files import DIT, fingerprint
from pusa_fast.weights.pretrained import ModelFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What to change when memory runs out in a step, and in samples.


@dataclass(frozen=True)
class Outcome:
    """What `train` did. `weights`: the file it wrote, None where it was stopped before the last step; `signal`: what stopped it."""

    step: int
    weights: Path | None
    signal: int | None = None


def train(config: TrainConfig) -> Outcome:
    """Train to the last step, or until SIGTERM or SIGINT, which leave a checkpoint; started again, it goes on from the newest.

    Raises ValueError and OSError for what cannot work, before the model is loaded; FloatingPointError where the loss is no
    number any more, naming the clips. In all cases the checkpoints written so far stay.
    """
    files, store = check(config)
    with joined(resolve_device(config.device)) as world, ExitStack() as stack:

        def first() -> None:
            config.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(config.out))
            check_encoders(config, store, files)

        world.first_does(first)
        return Trainer(config, files, store, world).run()


def export_run(config: TrainConfig) -> Outcome:
    """Write the weights of a run's newest checkpoint as `train` does at its end. Raises ValueError where there is none."""
    files, store = check(config)
    with joined(resolve_device(config.device)) as world:
        trainer = Trainer(config, files, store, world)
        if not trainer.step:
            raise ValueError(f"{config.out} holds no checkpoint: train first")
        return Outcome(trainer.step, trainer.export())


class Trainer:
    """One run of `config` in this process of `world`. `dit` is what trains; `step`, how many steps it has behind it.

    `base`: a transformer to train in place of the one in `files`, in the dtype and on the device it is to have.
    """

    def __init__(
        self, config: TrainConfig, files: ModelFiles, store: LatentStore, world: World, base: WanDiT | None = None
    ) -> None:
        self.config, self.world, self.store = config, world, store
        shift = config.objective.shift or float(files.defaults["shift"])
        self.shift, self.sampling = shift, config.sampling(shift)
        self.data = TrainingData(
            store, self.sampling, batch_size=config.batch_size, accumulate=config.accumulate, seed=config.seed,
            caption_dropout=config.data.caption_dropout, held_out=config.data.validation_clips, rank=world.rank, world=world.size,
        )  # fmt: skip
        self.dtype = DTYPES[config.dtype or ("bfloat16" if world.device.type == "cuda" else "float32")]
        resolve(config.attention, world.device, self.dtype, grad=True)
        sharded = config.parallel == "fsdp" and world.size > 1
        if sharded and config.optim.name == "muon":
            raise ValueError("optim.name muon needs whole matrices: use parallel ddp, or adamw")
        weights = "given" if base is not None else fingerprint(config.dit or files.dit, DIT)
        identity = {**config.identity(), "clips": store.fingerprint, "weights": weights, "dtype": str(self.dtype)}
        self.checkpoints = Checkpoints(config.out, identity, config.checkpoints.keep, world)
        dtype = self.dtype if config.lora else torch.float32
        self.dit = base or load_dit(config.dit or files.dit, device=world.device, dtype=dtype)
        _prepare(self.dit, config, fresh=self.checkpoints.newest() is None)
        check_clips(store, self.dit)
        save_memory(self.dit, config.memory.checkpointing, config.memory.offload)
        self.forward = distribute(self.dit, config.parallel, world, None if config.lora else self.dtype)
        self._autocast = config.lora is None and self.dtype is not torch.float32 and not sharded
        named = {name: p for name, p in self.dit.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.optimizers = optim.build_optimizers(named, config.optim)
        self.average = optim.Average(named, config.optim.ema_decay) if config.optim.ema_decay else None
        found = self.checkpoints.restore(self.dit, self.optimizers, self.average)
        self.step = 0 if found is None else int(found["step"])
        if self.step > config.steps:
            raise ValueError(
                f"{config.out} is at step {self.step}, past steps {config.steps}: raise steps, or give another out"
            )
        self.previews = Previews(config, files, store, world)
        self.peak = metrics.peak_flops(world.device)

    def run(self) -> Outcome:
        config = self.config
        if self.world.is_first:
            write_text(config.out / "config.yaml", dump_config(config))
        log = metrics.Metrics(config, self.step) if self.world.is_first else None
        saved, loss, weights = self.step, None, None
        with _stop_requests() as stop, closing(self.data.steps(self.step)) as steps:
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
        self, parts: list[Batch], stop: _Stop | None = None, clock: float | None = None
    ) -> dict[str, Any] | None:
        """One optimiser step over this process's share of a batch. Returns its row of metrics, timed from `clock` (None: from now).

        A `stop` that comes between two parts drops the step, which is the same when it is taken again, and returns None. Raises
        OutOfMemoryError that says what helps, FloatingPointError where the loss is no number.
        """
        with out_of_memory("train", f"at step {self.step + 1}"):
            return self._step(parts, stop, time.perf_counter() if clock is None else clock)

    def _step(self, parts: list[Batch], stop: _Stop | None, start: float) -> dict[str, Any] | None:
        config = self.config
        optim.set_rate(self.optimizers, optim.rate(self.step, config.steps, config.optim))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        frames: list[Tensor] = []
        total, levels = (
            torch.zeros((), device=self.world.device),
            torch.zeros(2, 4, dtype=torch.float64, device=self.world.device),
        )
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
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # the optimiser's time is this step's
        return self._row(mean, float(norm), sums[1:].view(2, 4), parts, time.perf_counter() - start)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted loss, frame errors [B, F], levels [B, F]) of the model on one batch."""
        device = self.world.device
        clean, noise, sigma, context = (t.to(device) for t in (batch.latents, batch.noise, batch.sigma, batch.context))
        noised, timestep, target = fafm.noised(
            clean, noise, sigma, torch.float32 if self.config.lora is None else self.dtype
        )
        with torch.autocast(device.type, self.dtype) if self._autocast else nullcontext():
            velocity = self.forward(noised, timestep, context)
        loss, errors = fafm.loss(velocity, target, sigma, self.config.objective.weighting, self.shift)
        return loss, errors, sigma

    def validate(self, log: metrics.Metrics | None) -> float | None:
        """Loss on held-out clips, with the averaged weights where there are such. None without held-out clips."""
        with self._averaged(), out_of_memory("train", f"at step {self.step}, in validation"):
            loss = self._validation_loss()
        if log is not None and loss is not None:
            log.write({"step": self.step, "validation_loss": loss})
            print(f"step {self.step}/{self.config.steps}: validation loss {loss:.5f}", flush=True)
        return loss

    def preview(self) -> None:
        """Make the sample clips, with the averaged weights where there are such. Raises OutOfMemoryError that says what helps."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # as the next step does first
        held = optim.held_bytes(self.optimizers, self.average)
        with (
            out_of_memory("validation", f"at step {self.step}"),
            self._averaged(),
            gathered(self.dit),
        ):
            self.previews.make(self.dit, self.step, held)

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        count, total = self.config.data.validation_clips, torch.zeros(2, dtype=torch.float64)
        sharded = self.config.parallel == "fsdp"  # then every process takes part in every forward
        for batch in validation_batches(
            self.store,
            count,
            self.data.share,
            self.sampling,
            self.config.seed,
            lambda n: sharded or n % self.world.size == self.world.rank,
        ):
            loss, _, _ = self.loss(batch)
            total += torch.tensor([float(loss) * len(batch.clips), len(batch.clips)], dtype=torch.float64)
        total = self.world.sum(total)
        return float(total[0] / total[1]) if count else None

    def export(self) -> Path:
        """Write what was trained, averaged where there is an average: lora.safetensors (released style) or dit.safetensors."""
        out, keep = self.config.out, self.world.is_first  # all gather, one keeps
        with self._averaged():
            if self.config.lora is not None:
                path, updates = out / "lora.safetensors", adapters.trained_updates(self.dit, _whole, keep)
                if keep:
                    adapters.write_lora(path, updates)
            else:
                path, state = out / "dit.safetensors", {}
                for name, tensor in self.dit.state_dict().items():
                    gathered_tensor = _whole(tensor)
                    if keep:
                        state[name] = gathered_tensor.cpu()
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
        """Whether this validation loss is the lowest so far. All processes have the same loss, the first one has the record."""
        best = self.checkpoints.best() if self.world.is_first else None
        return loss is not None and bool(self.world.gather(best is None or loss < best["loss"])[0])

    def _save(self, loss: float | None) -> None:
        self.checkpoints.save(self.step, self.dit, self.optimizers, self.average, {"processes": self.world.size}, loss)

    def _row(self, loss: float, norm: float, levels: Tensor, parts: list[Batch], seconds: float) -> dict[str, Any]:
        config = self.config
        tokens, work = (
            sum(f(self.dit.config, b.latents.shape, b.context.shape[1]) for b in parts)
            for f in (flops.tokens, flops.training_step(config))
        )
        row: dict[str, Any] = {
            "step": self.step,
            "loss": loss,
            "gradient_norm": norm,
            "lr": self.optimizers[-1].param_groups[0]["lr"],
        }
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
        """Names the clips of all processes whose errors are no numbers; where there are none, those of the batch."""
        clips = [f"{clip.source} ({clip.caption!r})" for batch in parts for clip in batch.clips]
        bad = [clip for clip, own in zip(clips, torch.cat(frames).isfinite().all(1).tolist(), strict=True) if not own]
        everyone = self.world.gather((bad, clips))
        named = ", ".join([c for own, _ in everyone for c in own] or [c for _, own in everyone for c in own])
        steps = self.checkpoints.steps()
        change = "lower optim.lr, set optim.clip_norm, or leave these clips out"
        last, start = "there is no checkpoint yet", "dit" if self.config.lora is None else "lora.start"
        if steps:  # its settings are those that failed
            last = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}"
            change += (
                f"; with other settings a run cannot go on, but begin from it: pusa-fast export {self.config.out} --out start.safetensors --dtype float32, "
                f"then set {start}=start.safetensors and another out"
            )
        return FloatingPointError(
            f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm} on {named}; {last}. To mend it, {change}"
        )


def _prepare(dit: WanDiT, config: TrainConfig, fresh: bool) -> None:
    """Make trainable what trains, in float32: adapters on a frozen base, or all of it. `fresh`: no checkpoint will be loaded."""
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
    """All processes' parts of a sharded tensor."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def _due(step: int, every: int, steps: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)


class _Stop:
    """Signals received. All processes stop at the same step, whichever of them was told."""

    received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = number
        os.write(2, b"stopping after this step, with a checkpoint\n")

    def agreed(self, world: World) -> bool:
        return bool(world.sum(torch.tensor([float(self.received is not None)]))[0])


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    stop = _Stop()
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: signals are the caller's business
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
