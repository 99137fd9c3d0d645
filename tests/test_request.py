"""A request without a model: what it checks, its JSON, and that it needs no torch. Runs on one
pipeline keep apart."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import Condition, DiTConfig, Pipeline, Tiling, VAEConfig
from pusa_fast.config import Geometry
from pusa_fast.options import ClipOptions, declared
from pusa_fast.request import FIELDS, Request
from pusa_fast.sampling.task import MediaFile
from pusa_fast.weights.pretrained import WAN_DEFAULTS

DIT = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=16)
GEOMETRY = Geometry.of(DIT, VAEConfig())


def test_the_module_imports_no_torch() -> None:
    code = "import sys, pusa_fast.request, pusa_fast.options, pusa_fast.media_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_check_needs_the_configuration_alone() -> None:
    checked = Request(prompt="a", num_frames=17, steps=4).check(GEOMETRY, WAN_DEFAULTS)
    assert checked.latent_shape == (1, 16, 5, 60, 104)
    assert (checked.settings.steps, checked.settings.shift, checked.plan.task) == (4, 5.0, "text-to-video")
    assert (checked.context, checked.negative) == ("a", WAN_DEFAULTS["negative_prompt"])
    assert Request(prompt="a", guidance_scale=1).check(GEOMETRY, WAN_DEFAULTS).negative is None


def test_the_geometry_decides_what_fits() -> None:
    """A VAE with one halving in time and in space, under patches of one latent."""
    other = Geometry(spatial_factor=2, temporal_factor=2, patch=(1, 1, 1), channels=4, text_dim=16, text_len=8)
    checked = Request(prompt="a", num_frames=7, height=6, width=10).check(other, WAN_DEFAULTS)
    assert checked.latent_shape == (1, 4, 4, 3, 5)
    with pytest.raises(ValueError, match="height=7 is not a multiple of 2 pixels"):
        Request(prompt="a", height=7).check(other, WAN_DEFAULTS)
    with pytest.raises(ValueError, match=r"num_frames=7 is not 4n\+1"):
        Request(prompt="a", num_frames=7).check(GEOMETRY, WAN_DEFAULTS)


def test_another_seed_is_checked_too() -> None:
    checked = Request(prompt="a").check(GEOMETRY, WAN_DEFAULTS)
    again = checked.with_seed(7)
    assert (again.settings.seed, again.request.seed, checked.settings.seed) == (7, 7, 0)
    with pytest.raises(ValueError, match="seed must be"):
        checked.with_seed(-1)


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": "", "negative_prompt": "b", "steps": 4, "guidance_scale": 1.5, "shift": 3, "seed": 9, "compat": "exact"},
    {"prompt": "a", "num_frames": 9, "height": 32, "width": 48, "fit": "pad", "tiling": "exact"},
    {
        "conditions": [
            Condition("/a.png", -1, 0.2),
            Condition(MediaFile("/b.mp4", last_frames=5), (0, 1), (0.0, 0.3), (0, 1)),
        ]
    },
]


@pytest.mark.parametrize("given", REQUESTS)
def test_json_and_back(given: dict[str, Any]) -> None:
    request = Request(**given)
    written = json.loads(json.dumps(request.to_json()))
    again = Request.from_json(written)
    assert again.to_json() == written
    same = {name: getattr(again, name) for name in given if name != "conditions"}
    assert same == {name: value for name, value in given.items() if name != "conditions"}


def test_json_keys_are_the_options_names() -> None:
    request = Request(prompt="a", negative_prompt="b", num_frames=5, guidance_scale=2.0)
    written = request.to_json()
    assert (written["negative"], written["frames"], written["guidance"]) == ("b", 5, 2.0)
    names = {name for name, _ in FIELDS.values()} - {"height", "width"}
    assert names <= set(declared(ClipOptions)), "every key is an option"
    assert [entry["path"] for entry in Request(**REQUESTS[3]).to_json()["conditions"]] == ["/a.png", "/b.mp4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "a"}, "unknown key 'prompts': use prompt, "),
        ({"num_frames": 5}, "unknown key 'num_frames'"),
        ({"prompt": 1}, "prompt=1 is not a str"),
        ({"steps": True}, "steps=True is not a int"),
        ({"conditions": {}}, "conditions={} is not a list"),
        ({"conditions": [{"latent": 0}]}, "needs a path"),
        ({"conditions": [{"path": "a", "latent": "0"}]}, "latent='0' must be a number"),
    ],
)
def test_json_refused(given: dict[str, Any], message: str) -> None:
    if message.startswith("conditions={}"):
        given = {"conditions": {"a": 1}}
        message = "conditions={'a': 1} is not a list"
    with pytest.raises(ValueError, match=message):
        Request.from_json(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 16)}, "prompt_embeds cannot be written"),
        ({"tiling": Tiling()}, "cannot be written as JSON: give its name"),
        ({"conditions": [Condition(torch.zeros(8, 8, 3, dtype=torch.uint8))]}, "only conditions on files"),
        ({"conditions": [Condition("a.mp4", slice(0, 2))]}, "only conditions on files, at numbered latents"),
    ],
)
def test_what_json_cannot_hold(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**given).to_json()


# ---- runs on one pipeline
# --------------------------------------------------------------------------------------------

PROMPTS = [f"a {colour} {shape} moves left" for colour in ("red", "blue") for shape in ("circle", "square")]


@pytest.fixture(scope="module")
def nano() -> Pipeline:
    return Pipeline.from_pretrained("nano", device="cpu")


def request_of(number: int) -> Request:
    """Prompts, seeds, lengths and steps that differ, so that a mixed-up record shows."""
    prompt = PROMPTS[number % len(PROMPTS)]
    return Request(prompt=prompt, seed=number, steps=1 + number % 3, num_frames=5 + 4 * (number % 2), output="latents")


def is_record_of(record: dict[str, Any], number: int) -> bool:
    wanted = {"seed": number, "steps": 1 + number % 3, "num_frames": 5 + 4 * (number % 2)}
    return record | wanted == record and set(record["seconds"]) == {"text", "encode", "denoise"}


def test_eight_threads_share_a_pipeline(nano: Pipeline) -> None:
    alone = [nano.run(request_of(number)) for number in range(8)]
    assert nano.text_encoder is not None
    nano.text_encoder._cache.clear()
    together: dict[int, Any] = {}

    def work(number: int) -> None:
        together[number] = nano.run(request_of(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert torch.equal(together[number].latents, alone[number].latents)
        assert is_record_of(together[number].record, number)


def test_a_run_within_a_run(nano: Pipeline) -> None:
    """Requests interleaved on one pipeline: the second runs between two steps of the first."""
    alone = [nano.run(request_of(number)).latents for number in (2, 5)]
    inner: list[Any] = []

    def other(step: int, _steps: int, _latents: Tensor) -> None:
        if step == 1:
            inner.append(nano.run(request_of(5)))

    outer = nano.run(request_of(2), other)
    assert outer.latents is not None and alone[0] is not None and torch.equal(outer.latents, alone[0])
    assert torch.equal(inner[0].latents, alone[1])
    assert is_record_of(outer.record, 2) and is_record_of(inner[0].record, 5)
    assert nano.last_run is inner[0].record, "the run that began last"


def test_text_from_threads_is_text_alone(nano: Pipeline) -> None:
    encoder = nano.text_encoder
    assert encoder is not None
    prompts = [f"{size} {prompt}" for prompt in PROMPTS for size in ("a large", "a")]
    alone = {prompt: encoder.encode([prompt]).clone() for prompt in prompts}
    got: dict[str, Tensor] = {}
    for _ in range(10):
        encoder._cache.clear()

        def work(start: int) -> None:
            got.update({prompt: encoder.encode([prompt]) for prompt in prompts[start::8]})

        threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(got[prompt], alone[prompt]) for prompt in prompts)
        assert all(torch.equal(encoder.encode([prompt]), alone[prompt]) for prompt in prompts)


def test_a_request_checked_for_another_model_is_refused(nano: Pipeline) -> None:
    checked = Request(prompt="a").check(GEOMETRY, WAN_DEFAULTS)
    with pytest.raises(ValueError, match="check it again"):
        nano.run(checked)
