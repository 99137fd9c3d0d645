"""`bench e2e`: whole `Pipeline` runs, timed by stage, and single forwards against the roofline.

`--model nano` or a model's folder runs real weights. `--model wan2.1-t2v-14b --random-weights`
makes a model of that size on a GPU, text encoder (UMT5-XXL) and VAE included: time and memory are
realistic, the pictures are noise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Options, Recorder
from bench.peaks import TEXT_TOKENS, attention_rate, block_flops, floor_seconds, measure_peaks
from bench.registry import Shape
from bench.timing import CacheFlush, Run, measure, significant, spread
from pusa_fast import Condition, DiTConfig, Pipeline, VAEConfig, WanDiT, WanVAE
from pusa_fast.config import MODELS
from pusa_fast.model.text import TextEncoder, load_tokenizer
from pusa_fast.weights.pretrained import find_model

Row = dict[str, Any]

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
FRAMES = 81
PROMPT = "a red circle moves right on a gray background"
# UMT5-XXL's encoder: 5.68e9 parameters.
_UMT5 = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24}


def run(options: Options, recorder: Recorder) -> None:
    if options.precision not in (None, "fp8"):
        raise ValueError(f"--precision {options.precision} does not exist: choose fp8, or leave it out")
    plan = _plan(options, recorder.device)
    recorder.save(**plan)
    recorder.working_on(f"loading {plan['model']}")
    start = time.perf_counter()
    pipe = (
        _random(plan["model"], recorder.device, options)
        if options.random_weights
        else _stored(plan["model"], recorder.device, options)
    )
    peaks = measure_peaks(recorder.device, options.quick) if recorder.device.type == "cuda" else None
    recorder.save(load_s=significant(time.perf_counter() - start), peaks=peaks, runs=[])
    for label in ("cold", "warm"):
        if recorder.out_of_time:
            recorder.result["runs"].append({"run": label, "status": "skipped", "reason": "out of time (--seconds)"})
            continue
        recorder.working_on(f"{plan['steps']} steps end to end, {label}")
        recorder.result["runs"].append({"run": label, **_end_to_end(pipe, plan, options.quick)})
        recorder.save()
        if label == "cold":  # the most important figure comes before the second run
            recorder.working_on("forwards of the transformer")
            _forwards(pipe, plan, recorder, peaks)
    _show(recorder)


def _plan(options: Options, device: torch.device) -> Row:
    """Model, size and steps. Raises ValueError for what cannot run, before building anything."""
    model = options.model or ("wan2.1-t2v-14b" if options.random_weights else "nano")
    if options.size is not None and options.size not in SIZES:
        raise ValueError(f"--size {options.size} does not exist: choose from {', '.join(SIZES)}")
    steps = 4 if options.steps is None else options.steps
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if options.random_weights:
        names = [
            name
            for name, config in MODELS.items()
            if isinstance(config, DiTConfig) and config.in_channels == VAEConfig().z_dim
        ]
        if model not in names:
            raise ValueError(f"--model {model} is not a size with random weights: choose from {', '.join(names)}")
        if device.type != "cuda":
            raise ValueError(f"--model {model} --random-weights needs a GPU of 80 GB: on the CPU run --model nano")
    elif model in MODELS:
        raise ValueError(f"--model {model} is a size, not weights: add --random-weights, or give a model's folder")
    else:
        find_model(model)  # a ValueError that says what is missing
    if model == "nano":
        if options.size is not None:
            raise ValueError(f"--size {options.size}: nano has its own size, leave it out")
        return {"model": model, "random_weights": False, "size": None, "steps": steps}
    return {"model": model, "random_weights": options.random_weights, "size": options.size or "480p", "steps": steps}


def _stored(model: str, device: torch.device, options: Options) -> Pipeline:
    return Pipeline.from_pretrained(model, device=device, precision=options.precision)


@torch.no_grad()
def _random(model: str, device: torch.device, options: Options) -> Pipeline:
    """All three networks at full size in bf16; small weights, so that 40 blocks do not overflow."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = MODELS[model]
    assert isinstance(config, DiTConfig)
    with torch.device("meta"):
        dit, vae = WanDiT(config), WanVAE(VAEConfig())
        text = UMT5EncoderModel(UMT5Config(**_UMT5, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    for module in (dit, vae, text):
        _fill(module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False))
    text.set_input_embeddings(text.shared)  # one table under two names, separated by to_empty
    if options.precision == "fp8":
        from pusa_fast.model.fp8 import quantize

        quantize(dit)
    return Pipeline(dit, vae, _PlainText(text, load_tokenizer(find_model("nano").tokenizer), TEXT_TOKENS))


class _PlainText(TextEncoder):
    """Neither cleans nor caches prompts: each run pays for its text."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        rows = [self._forward(prompt) for prompt in prompts]
        return torch.stack([torch.cat([r, r.new_zeros(self.text_len - r.shape[0], r.shape[1])]) for r in rows])


def _fill(module: nn.Module) -> None:
    """Random parameters: gains near one, the rest small. These models' buffers hold nothing."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        gain = name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight"))
        parameter.normal_(mean=1.0 if gain else 0.0, std=0.02)


def _settings(pipe: Pipeline, plan: Row) -> dict[str, Any]:
    if plan["size"] is None:
        return {
            "height": pipe.defaults["height"],
            "width": pipe.defaults["width"],
            "num_frames": pipe.defaults["num_frames"],
        }
    height, width = SIZES[plan["size"]]
    return {"height": height, "width": width, "num_frames": FRAMES}


@torch.no_grad()
def _forwards(pipe: Pipeline, plan: Row, recorder: Recorder, peaks: Row | None) -> None:
    """Prepared forwards at full size: one clean frame, the rest at one noise level."""
    device, size, dit = pipe.device, _settings(pipe, plan), pipe.dit
    assert isinstance(dit, WanDiT)
    scale, F = pipe.vae.config.spatial_factor, pipe.vae.latent_frames(size["num_frames"])
    h, w = size["height"] // scale, size["width"] // scale
    config = dit.config
    x = torch.randn(1, config.in_channels, F, h, w, device=device)
    levels = torch.tensor([[0.0] + [900.0] * (F - 1)])
    context = torch.randn(1, TEXT_TOKENS, config.text_dim, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with clock(device) as prepare_s:
        state = dit.prepare(levels, context)
    _check(dit.denoise(x, 0, state), x.shape)
    quick = recorder.result["quick"]
    budget = (0.3 if quick else 2.0) if device.type == "cpu" else 20.0
    seconds = measure(
        {"forward": Run(lambda: dit.denoise(x, 0, state))}, device, budget, CacheFlush(device, enabled=False), 3, 20, 0
    )["forward"]
    _, ph, pw = config.patch_size
    shape = Shape("forward", (F, h // ph, w // pw), config.dim, config.num_heads, config.ffn_dim)
    own = spread(seconds)
    found: Row = {
        "tokens": shape.tokens, "seconds": own, "prepare_s": significant(prepare_s()),
        "tflop": significant(config.num_layers * sum(block_flops(shape).values()) / 1e12),
        "peak_gib": memory_gib(device), "precision": getattr(dit, "precision", None),
    }  # fmt: skip
    if peaks is not None:
        rate = attention_rate(shape, device, quick)
        floor = floor_seconds(
            shape, config.num_layers, peaks["product_bf16"]["tflops"] * 1e12, rate, peaks["copy"]["gbps"] * 1e9
        )
        found |= {
            "attention_tflops": significant(rate / 1e12),
            "roofline_s": {name: significant(value) for name, value in floor.items()},
            "x_roofline": significant(own["median"] / floor["total"]),
        }
    recorder.save(forward=found)


def _end_to_end(pipe: Pipeline, plan: Row, quick: bool) -> Row:
    """One clip, its first frame given, without guidance; stage times from the pipeline."""
    size = _settings(pipe, plan)
    if quick:
        size["num_frames"] = min(size["num_frames"], 5)
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
    if pipe.text_encoder is not None and not isinstance(pipe.text_encoder, _PlainText):
        pipe.text_encoder = TextEncoder(
            pipe.text_encoder.model, pipe.text_encoder.tokenizer, pipe.text_encoder.text_len
        )  # forgets prompts
    first = torch.randint(0, 256, (size["height"], size["width"], 3), dtype=torch.uint8)
    conditions = [Condition(first, latent=0, noise=0.0)] if importlib.util.find_spec("av") else []
    with clock(pipe.device) as total:
        try:
            frames = pipe(PROMPT, conditions=conditions, steps=plan["steps"], guidance_scale=1.0, seed=0, **size)
        except torch.OutOfMemoryError as error:
            return {"status": "failed", "reason": str(error), "stages_s": dict(pipe.last_run["seconds"])}
    if tuple(frames.shape) != (size["num_frames"], size["height"], size["width"], 3):
        raise AssertionError(f"the pipeline returned frames of shape {tuple(frames.shape)}")
    stages, apart = dict(pipe.last_run["seconds"]), 0.0
    if not conditions:  # without PyAV the pipeline takes no pictures: encode the first frame separately
        with clock(pipe.device) as encode:
            pipe.vae.encode(first.to(pipe.device, torch.float32).permute(2, 0, 1)[None, :, None] / 127.5 - 1)
        apart = encode()
        stages["encode"] += apart
    rounded = {name: significant(spent) for name, spent in stages.items()}
    return {
        "status": "ok",
        "total_s": significant(total() + apart),
        "stages_s": rounded,
        "peak_gib": memory_gib(pipe.device),
        **size,
    }


def _check(velocity: Tensor, shape: torch.Size) -> None:
    if velocity.shape != shape or not bool(velocity.isfinite().all()):
        raise AssertionError(
            f"a forward returned {tuple(velocity.shape)}, expected {tuple(shape)}, or values that are not finite"
        )


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds spent inside, the device's work included."""
    spent: list[float] = []
    start = time.perf_counter()
    yield lambda: spent[0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent.append(time.perf_counter() - start)


def memory_gib(device: torch.device) -> float:
    """High-water mark. CUDA: the allocator's since its reset. CPU: the whole process's."""
    if device.type == "cuda":
        return significant(torch.cuda.max_memory_allocated(device) / 2**30)
    return significant(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def _show(recorder: Recorder) -> None:
    found = recorder.result
    forward = found["forward"]
    lines = [
        [f"forward ({forward['tokens']} tokens)", f"{forward['seconds']['median']:.4g}", f"{forward['peak_gib']:.3g}"]
    ]
    if "roofline_s" in forward:
        lines.append(["roofline of a forward", f"{forward['roofline_s']['total']:.4g}", ""])
    for row in found["runs"]:
        if row["status"] != "ok":
            lines.append([row["run"], f"{row['status']}: {row['reason']}", ""])
            continue
        lines += [[f"{row['run']}: {stage}", f"{spent:.4g}", ""] for stage, spent in row["stages_s"].items()]
        lines.append([f"{row['run']}: total", f"{row['total_s']:.4g}", f"{row['peak_gib']:.3g}"])
    recorder.table(f"{found['model']}, {found['steps']} steps", ("", "s", "peak GiB"), lines)
