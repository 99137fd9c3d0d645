"""The trainer in one process: what a step computes, against plain formulas, and what it logs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast.data.store import LatentStore, StoreWriter
from pusa_fast.model.linear import adapters
from pusa_fast.testing import make_input, relative_error
from pusa_fast.training import optim, trainer
from pusa_fast.training.data import Batch
from pusa_fast.training.metrics import read_metrics
from pusa_fast.training.trainer import train
from runs import TIMINGS, begin, first_batch, losses, rows, same, saved, trained, weights

# What a step computes.


def test_loss_falls_and_frozen_weights_stay(tiny: Any) -> None:
    config = tiny.config(objective={"weighting": "uniform"}, lora={"rank": 16}, optim={"lr": 0.01})
    made = begin(config)
    frozen = {name: p.detach().clone() for name, p in made.dit.named_parameters() if not p.requires_grad}
    parts = [first_batch(made)]
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


def test_loss_is_the_formula_of_the_reference(tiny: Any) -> None:
    made = begin(tiny.config(objective={"shift": 5.0}))
    batch = first_batch(made)
    loss, errors, sigma = made.loss(batch)
    # The shifted grid, its bell, and mean squared error times the mean weight of the clip's
    # frames (spec 5.2).
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
    batch = first_batch(made)
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
    told = [made.train_step([first_batch(made)])["gradient_norm"] for made in (plain, clipped)]
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
        batch, plain = first_batch(again), begin(tiny.config("plain", lora={"start": start}))
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


def test_metrics_rows_say_what_they_should(tiny: Any) -> None:
    config = tiny.config()
    train(config)
    for number, row in enumerate(read_metrics(config.out), 1):
        assert row["step"] == number and {"loss", "gradient_norm", "lr", *TIMINGS} <= row.keys()
    assert any(f"error_level_{q}of4" in row for row in rows(config) for q in (1, 2, 3, 4))
    assert (config.out / "config.yaml").is_file()
