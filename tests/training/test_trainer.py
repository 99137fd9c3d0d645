"""The trainer in one process: what it computes against plain formulas, and that interruption changes nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pusa_fast.data.lock import alone
from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.model.linear import adapters
from pusa_fast.testing import make_input, relative_error
from pusa_fast.training import optim, trainer, validation
from pusa_fast.training.data import Batch, validation_batches
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.parallel import World
from pusa_fast.training.preflight import check
from pusa_fast.training.trainer import Trainer, train
from pusa_fast.weights import checkpoint, keymap, load_dit

TIMINGS = ("seconds", "tokens_per_second", "memory_gib")
# Everything that has a state: a schedule, averages, dropped captions.
STATEFUL: dict[str, Any] = {
    "optim": {"schedule": "cosine", "warmup_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
    "data": {"caption_dropout": 0.2, "validation_clips": 3},
    "validation": {"every": 2},
}
MUON: dict[str, Any] = {
    "lora": None,
    "optim": {"name": "muon", "lr": 1e-3, "muon_lr": 3e-3, "schedule": "cosine", "ema_decay": 0.9},
}
FULL: dict[str, Any] = {"lora": None, "optim": {"lr": 1e-3}}


def begin(config: Any, rank: int = 0, size: int = 1) -> Trainer:
    return Trainer(config, *check(config), World(torch.device("cpu"), rank, size))


def rows(config: Any) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(config.out)]


def losses(config: Any) -> list[float]:
    return [row["loss"] for row in rows(config) if "loss" in row]


def weights(config: Any) -> dict[str, Tensor]:
    return load_file(config.out / ("lora.safetensors" if config.lora else "dit.safetensors"))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(config: Any) -> list[str]:
    return sorted(path.name for path in (config.out / "checkpoints").iterdir())


def trained(made: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.dit.named_parameters() if p.requires_grad}


# What a step computes.


def test_loss_falls_and_frozen_weights_stay(tiny: Any) -> None:
    config = tiny.config(objective={"weighting": "uniform"}, lora={"rank": 16}, optim={"lr": 0.01})
    made = begin(config)
    frozen = {name: p.detach().clone() for name, p in made.dit.named_parameters() if not p.requires_grad}
    parts = [_batch(made)]
    found = [made.train_step(parts)["loss"] for _ in range(40)]
    assert found[-1] < 0.75 * found[0], found
    now = dict(made.dit.named_parameters())
    assert len(frozen) > 30 and all(torch.equal(now[name], p) for name, p in frozen.items())


def test_a_run_says_what_it_did(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(logging={"every": 2})
    done = train(config)
    assert (done.step, done.signal, done.weights) == (6, None, config.out / "lora.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert "tokens/s" in lines[0] and saved(config) == ["step-000006"]


def test_accumulation_equals_one_batch(tiny: Any) -> None:
    whole, parts = (tiny.config(f"{n}", accumulate=n, data={"caption_dropout": 0.3}) for n in (1, 4))
    for config in (whole, parts):
        train(config)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    a, b = weights(whole), weights(parts)
    assert all(relative_error(b[name], a[name]) < 1e-4 for name in a)
    assert [row["gradient_norm"] for row in rows(parts)] == pytest.approx(
        [row["gradient_norm"] for row in rows(whole)], rel=1e-4
    )


def _batch(made: Trainer, step: int = 0) -> Batch:
    (batch,) = next(iter(made.data.steps(step)))
    return batch


def test_loss_is_the_formula_of_the_reference(tiny: Any) -> None:
    made = begin(tiny.config(objective={"shift": 5.0}))
    batch = _batch(made)
    loss, errors, sigma = made.loss(batch)
    # The shifted grid, its bell, and mean squared error times the mean weight of the clip's frames (spec 5.2).
    s = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    t = 1000 * 5 * s / (1 + 4 * s)
    bell = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    scale, least = 1000 / (bell - bell.min()).sum(), bell.min()
    clean, noise, level = batch.latents.double(), batch.noise.double(), batch.sigma.double()
    at = level[:, None, :, None, None]
    with torch.no_grad():
        velocity = made.dit(((1 - at) * clean + at * noise).float(), (1000 * level).float(), batch.context).double()
    error = (velocity - (noise - clean)).square()
    weight = (torch.exp(-2 * ((1000 * level - 500) / 1000) ** 2) - least) * scale
    expected = (error.flatten(1).mean(1) * weight.mean(1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(errors.double(), error.mean((1, 3, 4)), rtol=1e-4)
    assert torch.equal(sigma, batch.sigma)


def test_a_clean_first_frame_teaches_nothing(tiny: Any) -> None:
    made = begin(tiny.config(objective={"first_frame_clean": True, "weighting": "uniform"}))
    batch = _batch(made)
    assert not batch.sigma[:, 0].any() and bool((batch.sigma[:, 1:] > 0).all())

    def gradient(noise: Tensor) -> list[Tensor]:
        changed = Batch(batch.latents, noise, batch.sigma, batch.context, batch.clips)
        made.dit.zero_grad()
        made.loss(changed)[0].backward()
        return [p.grad.clone() for p in made.parameters if p.grad is not None]

    other = batch.noise.clone()
    other[:, :, 0] = 100.0
    first, second = gradient(batch.noise), gradient(other)
    assert len(first) == len(made.parameters) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other[:, :, 1] = 1.0
    assert not all(torch.equal(a, b) for a, b in zip(first, gradient(other), strict=True))


def test_a_clean_first_frame_needs_a_second_one(tiny: Any) -> None:
    folder = tiny.runs / "stills"
    with StoreWriter(folder, LatentStore(tiny.clips).model) as writer:
        writer.add("a", make_input(16, 1, 4, 4), make_input(2, 64), source="still.png", caption="")
    with pytest.raises(ValueError, match=r"still\.png.*first_frame_clean"):
        begin(tiny.config(data={"path": str(folder)}, objective={"first_frame_clean": True}))


def test_optimiser_is_adamw_at_the_rates_of_the_schedule(tiny: Any) -> None:
    """Two steps against AdamW by hand on the trainer's own gradients."""
    options = {
        "lr": 0.01,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "schedule": "cosine",
        "final_lr": 0.1,
    }
    made = begin(tiny.config(steps=6, optim=options, lora=None))
    state: dict[str, tuple[Tensor, Tensor]] = {}
    steps = made.data.steps(0)
    for number, factor in enumerate((0.5, 1.0, 1.0, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))), 1):
        before = {n: p.double() for n, p in trained(made).items()}
        row = made.train_step(next(steps))
        assert row["lr"] == pytest.approx(0.01 * factor) and row["step"] == number
        after = trained(made)
        for name, p in made.dit.named_parameters():
            assert p.grad is not None
            g = p.grad.double()
            m, v = state.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            state[name] = m, v
            step = (m / (1 - 0.8**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-6)
            expected = before[name] * (1 - row["lr"] * 0.1) - row["lr"] * step
            assert torch.allclose(after[name].double(), expected, rtol=1e-4, atol=1e-7), name


def test_gradients_are_clipped_and_their_norm_is_told_unclipped(tiny: Any) -> None:
    plain, clipped = begin(tiny.config(lora=None)), begin(tiny.config(lora=None, optim={"clip_norm": 0.01}))
    told = [made.train_step([_batch(made)])["gradient_norm"] for made in (plain, clipped)]
    norms = [
        float(torch.stack([p.grad.norm() for p in made.parameters if p.grad is not None]).norm())
        for made in (plain, clipped)
    ]
    assert (
        told[0] == told[1] == pytest.approx(norms[0], rel=1e-5)
        and told[0] > 0.1
        and norms[1] == pytest.approx(0.01, rel=1e-3)
    )


def test_averages_by_hand(tiny: Any) -> None:
    config = tiny.config(optim={"ema_decay": 0.3})
    made = begin(config)
    expected = {name: p.double() for name, p in trained(made).items()}
    for step, parts in zip(range(4), made.data.steps(0), strict=False):
        made.train_step(parts)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * p.double() for name, p in trained(made).items()}
    assert made.average is not None
    now = trained(made)
    assert all(torch.allclose(made.average.tensors[n].double(), expected[n], rtol=1e-5, atol=1e-7) for n in expected)
    config.out.mkdir()
    made.export()
    A = dict(adapters(made.dit))["blocks.0.self_attn.q"].lora_A
    written = weights(config)["blocks.0.self_attn.q.lora_A.default.weight"]
    assert not torch.equal(written, A) and torch.allclose(
        written.double(), expected["blocks.0.self_attn.qkv.adapters.blocks-0-self_attn-q.lora_A"], rtol=1e-5, atol=1e-7
    )
    assert same(trained(made), now), "the averages stayed in the model"


def test_rates() -> None:
    made = optim.rate
    cosine = trainer.TrainConfig(
        data={"path": "x"}, out="y", optim={"schedule": "cosine", "warmup_steps": 4, "final_lr": 0.1}
    ).optim
    assert [made(step, 14, cosine) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert (
        made(4, 14, cosine) == 1.0
        and made(9, 14, cosine) == pytest.approx(0.55)
        and made(14, 14, cosine) == pytest.approx(0.1)
    )
    constant = trainer.TrainConfig(data={"path": "x"}, out="y").optim
    assert [made(step, 14, constant) for step in (0, 5, 100)] == [1.0] * 3


def test_bf16_base_keeps_float32_masters(tiny: Any) -> None:
    made = begin(tiny.config(dtype="bfloat16", optim={"lr": 1e-5}, lora={"init": "gaussian"}))
    before = trained(made)
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert {p.dtype for p in made.dit.parameters() if not p.requires_grad} == {torch.bfloat16}
    steps = made.data.steps(0)
    for _ in range(3):
        made.train_step(next(steps))
    name = next(n for n in before if n.endswith("lora_A"))
    moved = trained(made)[name] - before[name]
    fine = (moved.abs() > 0) & (moved.abs() < before[name].abs() / 256)
    assert float(fine.float().mean()) > 0.5, "no movement finer than bfloat16"


def test_full_bf16_training_is_near_float32(tiny: Any) -> None:
    exact, low = (tiny.config(dtype, dtype=dtype, lora=None, optim={"lr": 1e-3}) for dtype in ("float32", "bfloat16"))
    for config in (exact, low):
        train(config)
    assert {t.dtype for t in weights(low).values()} == {torch.float32}
    assert losses(low) != losses(exact) and losses(low) == pytest.approx(losses(exact), rel=0.02)


# Interruption.


class Killed(Exception):
    """As sudden as it gets without another process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, config: Any, step: int, before: Callable[[Trainer], None]) -> None:
    """Run until `step` steps are done, then let `before` do what it does."""
    plain = Trainer.train_step

    def counted(self: Trainer, *given: Any) -> dict[str, Any] | None:
        if self.step == step:
            before(self)
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        train(config)


def kill(made: Trainer) -> None:
    raise Killed


def ask(made: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_killed_and_resumed_is_as_if_nothing_had_been(
    tiny: Any, finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = {**STATEFUL, "checkpoints": {"every": 2}}
    whole, cut = finished(**settings), tiny.config("cut", **settings)
    before = threading.active_count()
    with pytest.raises(Killed):
        interrupt(monkeypatch, cut, step, kill)
    assert threading.active_count() == before
    assert begin(cut).step == step // 2 * 2
    train(cut)
    assert rows(cut) == rows(whole) and len(rows(whole)) == 6 + 3
    assert same(weights(cut), weights(whole))
    a, b = begin(whole), begin(cut)
    assert a.average is not None and b.average is not None and same(a.average.tensors, b.average.tensors)
    assert same(trained(a), trained(b)) and not same(trained(a), a.average.tensors)


@pytest.mark.parametrize("changes", [MUON, FULL], ids=["muon", "adamw"])
def test_full_fine_tuning_resumes(tiny: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    whole, cut = (tiny.config(name, **changes) for name in ("whole", "cut"))
    train(whole)
    interrupt(monkeypatch, cut, 2, ask)
    done = train(cut)
    assert done.weights == cut.out / "dit.safetensors"
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_stopped_by_a_signal_leaves_a_checkpoint(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (tiny.config(name, **STATEFUL) for name in ("whole", "cut"))
    train(whole)
    outcomes = []
    plain = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: outcomes.append(plain(self)) or outcomes[-1])
    interrupt(monkeypatch, cut, 2, ask)
    assert (outcomes[0].step, outcomes[0].signal, outcomes[0].weights) == (3, signal.SIGTERM, None)
    assert saved(cut)[-1] == "step-000003" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(cut)
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_an_interrupt_asked_twice_does_not_wait(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config()

    def twice(made: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, config, 2, twice)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_finished_run_started_again_writes_the_same(tiny: Any) -> None:
    config = tiny.config(**STATEFUL, checkpoints={"every": 2})
    train(config)
    first, told = weights(config), rows(config)
    (config.out / "lora.safetensors").unlink()
    assert train(config).step == 6
    assert same(weights(config), first) and rows(config) == told


def test_a_constant_rate_goes_on_for_more_steps(tiny: Any) -> None:
    longer, short = (
        tiny.config("a", steps=6, checkpoints={"every": 3}),
        tiny.config("b", steps=3, checkpoints={"every": 3}),
    )
    train(longer)
    train(short)
    train(short.model_copy(update={"steps": 6}))
    assert rows(short) == rows(longer) and same(weights(short), weights(longer))


def test_validation_previews_and_memory_change_no_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tiny.config("bare", memory={"checkpointing": "none"}, data={"validation_clips": 2})
    full = tiny.config(
        "full", data={"validation_clips": 2}, memory={"checkpointing": "block", "offload": True},
        validation={"every": 2, "samples": [{"prompt": "a"}], "steps": 2, "guidance_scale": 2.0},
    )  # fmt: skip
    _made_up_captions(monkeypatch)
    train(bare)
    train(full)
    assert losses(full) == losses(bare) and same(weights(full), weights(bare))


# Checkpoints.


def test_the_last_ones_and_the_best_stay(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, float("nan"), 1.5, 2.5])
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: next(values))
    config = tiny.config(checkpoints={"every": 1, "keep": 2}, validation={"every": 1})
    train(config)
    assert saved(config) == ["best.json", "step-000002", "step-000005", "step-000006"]
    assert json.loads((config.out / "checkpoints" / "best.json").read_text()) == {"step": 2, "loss": 1.0}


def test_a_best_that_was_deleted_is_no_best(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_validation_loss", lambda self: next(values))
    config = tiny.config(steps=2, checkpoints={"every": 1, "keep": 1}, validation={"every": 1})
    train(config)
    train(config.model_copy(update={"steps": 3}))
    assert saved(config) == ["best.json", "step-000002", "step-000003"]
    shutil.rmtree(config.out / "checkpoints" / "step-000002")
    train(config.model_copy(update={"steps": 4}))
    assert json.loads((config.out / "checkpoints" / "best.json").read_text()) == {"step": 4, "loss": 2.5}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"lora": {"rank": 8}}, "lora.rank was 4, is 8"),
        ({"optim": {"lr": 0.5}}, "optim.lr was 0.01, is 0.5"),
        ({"lora": None}, "lora was"),
        ({"data": {"validation_clips": 1}}, "data.validation_clips was 0, is 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tiny: Any, changes: dict[str, Any], named: str) -> None:
    train(tiny.config(steps=1, checkpoints={"every": 1}))
    with pytest.raises(ValueError, match="another configuration") as caught:
        train(tiny.config(**changes))
    assert named in str(caught.value) and "Give another out" in str(caught.value)


def test_a_moved_base_goes_on_and_another_one_does_not(tiny: Any) -> None:
    train(tiny.config(steps=1, checkpoints={"every": 1}))
    shutil.copy(tiny.dit, tiny.runs / "moved.safetensors")
    assert train(tiny.config(steps=2, dit=str(tiny.runs / "moved.safetensors"))).step == 2
    other = load_dit(tiny.dit)
    torch.nn.init.normal_(other.head.head.bias)
    checkpoint.save(tiny.runs / "other.safetensors", keymap.unpack(other.state_dict()), other.config)
    with pytest.raises(ValueError, match="another configuration: weights was"):
        train(tiny.config(steps=3, dit=str(tiny.runs / "other.safetensors")))
    with pytest.raises(ValueError, match=r"another configuration: dtype was 'torch\.float32', is 'torch\.bfloat16'"):
        train(tiny.config(steps=3, dtype="bfloat16"))


def test_fewer_steps_than_were_taken_are_refused(tiny: Any) -> None:
    train(tiny.config(steps=3))
    with pytest.raises(ValueError, match="is at step 3, past steps 2: raise steps"):
        train(tiny.config(steps=2))


def test_the_best_validation_loss_is_kept_wherever_it_falls(tiny: Any) -> None:
    config = tiny.config(
        steps=5, data={"validation_clips": 2}, validation={"every": 1}, checkpoints={"every": 0, "keep": 1}
    )
    train(config)
    losses = [row["validation_loss"] for row in read_metrics(config.out) if "validation_loss" in row]
    best = json.loads((config.out / "checkpoints" / "best.json").read_text())
    assert best == {"step": 1 + losses.index(min(losses)), "loss": min(losses)}
    assert f"step-{best['step']:06d}" in saved(config)


def test_a_stop_between_two_parts_drops_the_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (tiny.config(name, accumulate=2, steps=4) for name in ("whole", "cut"))
    train(whole)
    asked: list[int] = []
    plain = Trainer.loss

    def loss(self: Trainer, batch: Batch) -> Any:
        if self.step == 2 and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch)

    monkeypatch.setattr(Trainer, "loss", loss)
    assert train(cut).step == 2 and saved(cut) == ["step-000002"]
    train(cut)
    assert rows(cut) == rows(whole) and same(weights(cut), weights(whole))


def test_other_clips_are_refused_and_moved_ones_are_not(tiny: Any) -> None:
    config = tiny.config(steps=1, checkpoints={"every": 1})
    train(config)
    shutil.copytree(tiny.clips, tiny.runs / "moved")
    moved = tiny.config(steps=2, data={"path": str(tiny.runs / "moved")})
    assert train(moved).step == 2
    with StoreWriter(tiny.runs / "moved", LatentStore(tiny.clips).model) as writer:
        writer.add("new", make_input(16, 2, 4, 4), make_input(2, 64), source="n.mp4", caption="n")
    with pytest.raises(ValueError, match="clips was"):
        train(moved)


def _empty(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(b"")


def _cut(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").write_text("{"),
        lambda path: (path / "state.json").write_text("{}"),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / ".metadata").unlink(),
        lambda path: (path / ".metadata").write_bytes(b"no pickle"),
        _empty,
        _cut,
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    tiny: Any, finished: Callable[..., Any], damage: Callable[[Path], None]
) -> None:
    settings = {"steps": 4, "checkpoints": {"every": 2}}
    config = tiny.config(**settings)
    shutil.copytree(finished(**settings).out, config.out)
    told, path = rows(config), config.out / "checkpoints" / "step-000004"
    damage(path)
    with pytest.raises(ValueError, match=r"step-000004.*: delete .*to go on from the checkpoint before it") as caught:
        train(config)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    shutil.rmtree(path)
    assert train(config).step == 4 and rows(config) == told


def test_a_folder_without_state_is_none(tiny: Any) -> None:
    config = tiny.config(steps=2, checkpoints={"every": 1})
    train(config)
    shutil.copytree(config.out / "checkpoints" / "step-000002", config.out / "checkpoints" / "step-000009.part")
    (config.out / "checkpoints" / "step-000002" / "state.json").unlink()
    assert begin(config).step == 1
    train(config)
    assert saved(config) == ["step-000001", "step-000002"], "what a kill left is swept up"


def _full_disk(*args: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "file")


@pytest.mark.parametrize("place", ["pusa_fast.training.saved.save", "os.fsync", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_what_was_there(
    tiny: Any, finished: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = {"checkpoints": {"every": 2}}
    whole, config = finished(**settings), tiny.config("full", **settings)
    plain, calls = Trainer._save, []

    def fails(self: Trainer, loss: float | None) -> None:
        if self.step != 4 or calls:
            return plain(self, loss)
        calls.append(self.step)
        with monkeypatch.context() as patch:
            patch.setattr(place, _full_disk)
            plain(self, loss)

    monkeypatch.setattr(Trainer, "_save", fails)
    before = threading.active_count()
    with pytest.raises(
        OSError,
        match=r"no checkpoint of step 4 \(the last one is .*step-000002\), for the disk is full: make room, and start",
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value) and threading.active_count() == before
    error: BaseException | None = caught.value
    chain = []
    while error is not None and len(chain) < 50:
        chain.append(error)
        error = error.__cause__
    assert len(chain) < 50, "the chain of causes is a ring"
    assert saved(config) == ["step-000002"]
    assert begin(config).step == 2
    train(config)
    assert rows(config) == rows(whole) and same(weights(config), weights(whole))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, as it does on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_system_refuses_to_write_a_checkpoint(tiny: Any) -> None:
    """torch's writer hides what the system said behind an error of its own."""
    config = tiny.config(
        steps=2, lora={"rank": 1024}, checkpoints={"every": 1}
    )  # each matrix is larger than what may be written
    begun = begin(config)
    begun._save(None)
    begun.step = 1
    with (
        files_of_at_most(100_000),
        pytest.raises(
            OSError,
            match=r"no checkpoint of step 1 \(the last one is .*step-000000\), for a file may not be as large as this here: raise ulimit -f",
        ),
    ):
        begun._save(None)
    assert saved(config) == ["step-000000"]


def test_the_system_refuses_to_write_weights(tiny: Any, tmp_path: Path) -> None:
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(
            tmp_path / "x.safetensors", {"a": torch.zeros(10_000)}, load_dit(tiny.dit, device="meta").config
        )
    assert (
        caught.value.errno == errno.EFBIG
        and not list(tmp_path.glob("*.safetensors*"))
        and not list(tmp_path.glob(".*"))
    )


def test_two_runs_in_one_folder(tiny: Any) -> None:
    config = tiny.config(steps=1)
    config.out.mkdir(parents=True)
    with alone(config.out), pytest.raises(ValueError, match="run is being written by another run: wait for it"):
        train(config)
    assert not list(config.out.iterdir())
    assert train(config).step == 1


def test_an_interrupt_while_saving_leaves_no_part(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pusa_fast.training.saved.save", interrupted)
    config = tiny.config(checkpoints={"every": 2})
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config)
    assert saved(config) == [] and caught.value.__cause__ is not caught.value


# Numbers that are none.


def test_no_number_names_the_clip_and_the_last_good_checkpoint(tiny: Any) -> None:
    folder = tiny.runs / "bad"
    store = LatentStore(tiny.clips)
    with StoreWriter(folder, store.model) as writer:
        for i, clip in enumerate(store.clips):
            latents = store.latents(i).clone()
            if clip.source == "6.mp4":
                latents[3, 1, 2, 2] = float("nan")
            writer.add(clip.key, latents, store.text(i), source=clip.source, caption=clip.caption)
    config = tiny.config(data={"path": str(folder)}, steps=50, batch_size=2, checkpoints={"every": 1})
    with pytest.raises(
        FloatingPointError, match=r"loss is nan .*6\.mp4 \('clip 6'\).*last good checkpoint is .*step-0"
    ) as caught:
        train(config)
    text = str(caught.value)
    others = [f"{i}.mp4" for i in range(11) if i != 6]
    assert not any(f" {name}" in text for name in others), "clips are blamed that are good"
    good = begin(config)
    assert good.step >= 1 and f"step-{good.step:06d}" in text and f"step {good.step + 1}:" in text
    assert all(bool(p.isfinite().all()) for p in good.parameters)


def test_no_number_in_the_gradient_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = begin(tiny.config())
    parts = next(made.data.steps(0))
    before = trained(made)
    made.parameters[5].register_hook(lambda g: g * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"gradient's norm (nan|inf) on .*there is no checkpoint yet"
    ) as caught:
        made.train_step(parts)
    assert all(clip.source in str(caught.value) for clip in parts[0].clips)
    assert same(trained(made), before) and made.step == 0


# What cannot work.


def test_world_that_does_not_divide_the_batch(tiny: Any) -> None:
    with pytest.raises(ValueError, match="batch of 4 clips cannot be shared by 3 processes in 1 parts"):
        begin(tiny.config(), rank=1, size=3)


def test_mistakes_are_found_before_the_model_is_loaded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("the model was loaded"))
    (tiny.runs / "file").write_text("")
    for changes, kind, message in (
        ({"dit": "gone.safetensors"}, FileNotFoundError, "dit gone.safetensors does not exist"),
        ({"data": {"path": "gone"}}, FileNotFoundError, "pusa-fast prepare"),
        ({"lora": {"start": "gone.safetensors"}}, FileNotFoundError, "lora.start gone.safetensors does not exist"),
        ({"out": str(tiny.runs / "file")}, NotADirectoryError, "give a folder"),
        (
            {"validation": {"every": 1, "samples": [{"prompt": "a", "image": "gone.png"}]}},
            FileNotFoundError,
            r"gone\.png",
        ),
        ({"device": "tpu"}, ValueError, "unknown device .tpu."),
        ({"device": "cpu:x"}, ValueError, "unknown device"),
        ({"attention": "flash9"}, ValueError, "flash9"),
        ({"batch_size": 6, "accumulate": 6, "data": {"validation_clips": 11}}, ValueError, "leaves none of 11 clips"),
    ):
        with pytest.raises(kind, match=message):
            train(tiny.config(**changes))
    config = tiny.config(lora=None, optim={"name": "muon"}, parallel="fsdp")
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        begin(config, size=2)


def test_clips_of_another_model_are_refused(tiny: Any) -> None:
    about = {**LatentStore(tiny.clips).model, "text_dim": 32}
    with StoreWriter(tiny.runs / "other", about) as writer:
        writer.add("a", make_input(16, 2, 4, 4), make_input(2, 32), source="a", caption="")
    with pytest.raises(ValueError, match="prepared for another model: its text_dim is 32, this one's 64"):
        begin(tiny.config(data={"path": str(tiny.runs / "other")}, batch_size=1))
    with StoreWriter(tiny.runs / "odd", {**about, "text_dim": 64}) as writer:
        writer.add("a", make_input(16, 2, 5, 4), make_input(2, 64), source="odd.mp4", caption="")
    with pytest.raises(ValueError, match=r"odd\.mp4: latents .* no multiple of the patch 2x2"):
        begin(tiny.config(data={"path": str(tiny.runs / "odd")}, batch_size=1))


@pytest.mark.parametrize(("part", "what"), [("vae", "VAE"), ("text", "text encoder or tokenizer")])
def test_clips_of_another_encoder_are_refused(tiny: Any, part: str, what: str) -> None:
    with StoreWriter(tiny.runs / "other", {**LatentStore(tiny.clips).model, part: "another's"}) as writer:
        writer.add("a", make_input(16, 2, 4, 4), make_input(2, 64), source="a", caption="")
    with pytest.raises(
        ValueError,
        match=f"other was prepared with another {what} than that of .*nano: prepare the clips with this model",
    ):
        train(tiny.config(data={"path": str(tiny.runs / "other")}, batch_size=1))
    assert (
        train(tiny.config(steps=1, data={"path": str(tiny.runs / "other"), "same_encoders": False}, batch_size=1)).step
        == 1
    )


def test_caption_dropout_without_an_empty_caption(tiny: Any) -> None:
    shutil.copytree(tiny.clips, tiny.runs / "bare")
    (tiny.runs / "bare" / "empty_text.safetensors").unlink()
    config = tiny.config(data={"path": str(tiny.runs / "bare"), "caption_dropout": 0.1})
    with pytest.raises(ValueError, match="holds no empty caption, so captions cannot be dropped"):
        train(config)
    assert train(tiny.config(steps=1, data={"path": str(tiny.runs / "bare")})).step == 1


# A LoRA to go on from.


def test_start_goes_on_from_a_lora(tiny: Any) -> None:
    first = tiny.config("first", steps=3)
    train(first)
    start = str(first.out / "lora.safetensors")
    again = begin(tiny.config("again", lora={"start": start, "alpha": 8.0}))
    for name, adapter in adapters(again.dit):
        assert torch.equal(adapter.lora_A, weights(first)[f"{name}.lora_A.default.weight"])
        assert (
            torch.allclose(adapter.lora_B * adapter.scale, weights(first)[f"{name}.lora_B.default.weight"])
            and adapter.scale == 2.0
        )
    with torch.no_grad():  # the same model, at another scale
        batch, plain = _batch(again), begin(tiny.config("plain", lora={"start": start}))
        assert float(again.loss(batch)[0]) == pytest.approx(float(plain.loss(batch)[0]), rel=1e-5) and again.step == 0
    fresh = tiny.config("gone", steps=2, lora={"start": start}, checkpoints={"every": 1})
    train(fresh)
    shutil.copytree(fresh.out, tiny.runs / "copy")
    Path(start).rename(start + ".moved")
    goes_on = tiny.config("copy", steps=3, lora={"start": start}, checkpoints={"every": 1})
    assert train(goes_on).step == 3  # the checkpoint has all that the file had
    Path(start + ".moved").rename(start)
    for wrong, message in (({"rank": 8}, "set lora.rank to 4"), ({"targets": ["q"]}, "make targets those of the file")):
        with pytest.raises(ValueError, match=message):
            begin(tiny.config("wrong", lora={"start": start, **wrong}))


# Validation and previews.


def _made_up_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions from thin air in place of the text encoder."""

    class Encoder:
        def encode(self, prompts: list[str]) -> Tensor:
            return make_input(1, 6, 64, seed=len(prompts[0]))

    monkeypatch.setattr(validation, "load_text_encoder", lambda *args: Encoder())


def test_validation_loss_is_that_of_the_averaged_weights(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        validation, "load_text_encoder", lambda *args: pytest.fail("the text encoder was loaded without samples")
    )
    config = tiny.config(
        steps=4,
        data={"validation_clips": 5},
        validation={"every": 2},
        optim={"ema_decay": 0.5},
        checkpoints={"every": 2},
    )
    train(config)
    told = [row for row in rows(config) if "validation_loss" in row]
    assert [row["step"] for row in told] == [2, 4] and not (config.out / "samples").exists()
    made = begin(config)
    assert made.average is not None
    plain = made._validation_loss()
    made.average.swap()
    held = list(validation_batches(LatentStore(tiny.clips), 5, 1, made.sampling, config.seed))
    total = sum(float(made.loss(batch)[0].detach()) for batch in held)
    assert (
        len(held) == 5
        and told[-1]["validation_loss"] == pytest.approx(total / 5, rel=1e-5)
        and told[-1]["validation_loss"] != plain
    )
    assert json.loads((config.out / "checkpoints" / "best.json").read_text())["loss"] == min(
        row["validation_loss"] for row in told
    )


def test_previews_are_files_one_can_look_at(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _made_up_captions(monkeypatch)
    picture = tiny.runs / "first.png"
    Image.new("RGB", (32, 32), (200, 30, 40)).save(picture)
    samples = [{"prompt": "a cat"}, {"prompt": "a red square", "image": str(picture), "seed": 5}]
    config = tiny.config(steps=2, validation={"every": 2, "samples": samples, "steps": 2})
    train(config)
    folder = config.out / "samples" / "step-000002"
    assert sorted(p.name for p in folder.iterdir()) == ["00.mp4", "01.mp4", "sheet.png"]
    with av.open(str(folder / "00.mp4")) as file:
        assert [(f.width, f.height) for f in file.decode(video=0)] == [(32, 32)] * 9, "not as large as the largest clip"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width >= 32 and sheet.height >= 64


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_fails_in_previews_costs_no_step(tiny: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _made_up_captions(monkeypatch)
    config = tiny.config(
        steps=4,
        validation={"every": 2, "samples": [{"prompt": "a"}], "steps": 1, "num_frames": 5},
        checkpoints={"every": 3},
    )
    with monkeypatch.context() as patch:
        patch.setattr(validation.Pipeline, "__call__", lambda *args, **named: (_ for _ in ()).throw(error))
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"in validation at step 2: make validation\.num_frames, .* the steps so far are saved",
        ):
            train(config)
    assert saved(config) == ["step-000002"]
    assert train(config).step == 4 and saved(config) == ["step-000002", "step-000003", "step-000004"]
    with av.open(str(config.out / "samples" / "step-000004" / "00.mp4")) as file:
        assert len(list(file.decode(video=0))) == 5


def test_a_sample_that_is_no_picture_is_found_before_anything_is_loaded(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_dit", lambda *args, **named: pytest.fail("a model was loaded"))
    text = tiny.runs / "text.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        train(tiny.config(validation={"every": 2, "samples": [{"prompt": "a", "image": str(text)}]}))
    with pytest.raises(ValueError, match=r"validation\.width 100 is no multiple of 16 pixels: use 96"):
        train(tiny.config(validation={"width": 100}))
    with pytest.raises(ValueError, match=r"validation\.num_frames=80 is not 4n\+1 .*use 77 or 81"):
        train(tiny.config(validation={"num_frames": 80}))


def test_samples_take_the_memory_that_training_leaves(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _made_up_captions(monkeypatch)
    seen: list[Any] = []
    monkeypatch.setattr(validation, "usable_memory", lambda device: 10**9)
    monkeypatch.setattr(
        validation.Pipeline,
        "__call__",
        lambda self, **named: seen.append(named["tiling"]) or torch.zeros(9, 32, 32, 3, dtype=torch.uint8),
    )
    config = tiny.config(steps=2, validation={"every": 2, "samples": [{"prompt": "a"}]}, optim={"ema_decay": 0.5})
    train(config)
    adapters_bytes = sum(t.nbytes for t in weights(config).values())
    made = begin(config)
    vae = made.previews._decoder()
    rest = 10**9 - sum(p.nbytes for model in (made.dit, vae) for p in model.parameters())
    steps = 4 * len(made.parameters)  # AdamW counts, in a float each
    assert seen[0].mode == "auto" and seen[0].memory == rest - 3 * adapters_bytes - steps  # two moments and an average

    def unknown(device: torch.device) -> int:
        raise ValueError("this system does not say how much memory it has")

    monkeypatch.setattr(validation, "usable_memory", unknown)
    made.preview()
    assert seen[1] is None


def test_metrics_rows_say_what_they_should(tiny: Any) -> None:
    config = tiny.config()
    train(config)
    for number, row in enumerate(read_metrics(config.out), 1):
        assert row["step"] == number and {"loss", "gradient_norm", "lr", *TIMINGS} <= row.keys()
    assert any(f"error_level_{q}of4" in row for row in rows(config) for q in (1, 2, 3, 4))
    assert (config.out / "config.yaml").is_file()
