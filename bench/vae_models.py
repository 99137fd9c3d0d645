"""One video VAE by us and by diffusers (AutoencoderKLWan), same weights; and the bare minimum.

Both do the same work on the same tensors: encode goes from pixels to the mean, normalised per
channel; decode from normalised latents to pixels clamped to [-1, 1]. diffusers' own calls stop
short of the normalisation: it is done for it inside the timing, on latents only, under a thousandth
of its time. The floor is what any implementation has to compute: every convolution of the model in
its published form, over the whole clip in one piece, on channels-last tensors that already have
their padding in time.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast import VAEConfig, WanVAE
from pusa_fast.model.vae.layers import CausalConv3d
from pusa_fast.ops.vae import can_add
from pusa_fast.testing import assert_within_budget, relative_error
from pusa_fast.weights import keymap

Call = Callable[[], Any]
DIRECTIONS = ("decode", "encode")
_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_PIECE = 1 << 30  # elements of a convolution's input: beyond 2^31 libraries fall back to slow code, or fail


@dataclass(frozen=True)
class Clip:
    """Frames, height and width in pixels, and what is tried at that size."""

    frames: int
    height: int
    width: int
    tile: tuple[int, int] = (30, 52)
    stride: tuple[int, int] = (15, 26)
    chunks: tuple[int, ...] = ()  # bytes

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


GATE_CLIP = Clip(9, 16, 24)  # three latent frames: the second and third read what earlier chunks left


def our_model(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> WanVAE:
    """Random weights that keep the signal's size; a missing bias or gain must show."""
    torch.manual_seed(0)
    with device:
        vae = WanVAE(config)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith(("bias", "gamma")):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            elif (
                name != "decoder.head.2.weight"
            ):  # there it would drive a part of the pixels into the clamp, which hides errors
                parameter.mul_(math.sqrt(3))
    return vae.to(dtype).eval().requires_grad_(False)


def their_model(vae: WanVAE) -> Any:
    """diffusers' model with a copy of `vae`'s weights, in its dtype, without slicing or tiling."""
    from diffusers import AutoencoderKLWan

    c = vae.config
    with torch.device("meta"):  # saves drawing weights that are replaced at once
        model: Any = AutoencoderKLWan(
            base_dim=c.base_dim, z_dim=c.z_dim, dim_mult=list(c.dim_mult), num_res_blocks=c.num_res_blocks,
            temperal_downsample=list(c.temporal_downsample), latents_mean=list(c.latents_mean),
            latents_std=list(c.latents_std),
        )  # fmt: skip
    own = {
        keymap.vae_to_diffusers(name, len(c.dim_mult), c.num_res_blocks): tensor.clone()
        for name, tensor in vae.state_dict().items()
    }
    model.load_state_dict(own, assign=True)
    return model.eval().requires_grad_(False)


def make_input(vae: WanVAE, direction: str, clip: Clip) -> Tensor:
    """Random pixels [1, 3, T, H, W] in [-1, 1] to encode, or latents [1, C, F, h, w] to decode."""
    generator = torch.Generator(vae.device).manual_seed(5)
    shape = input_shape(vae.config, direction, clip)
    if direction == "encode":
        return torch.rand(shape, generator=generator, device=vae.device).mul_(2).sub_(1).to(vae.dtype)
    return torch.randn(shape, generator=generator, device=vae.device).to(vae.dtype)


def input_shape(config: VAEConfig, direction: str, clip: Clip) -> tuple[int, ...]:
    if direction == "encode":
        return 1, 3, clip.frames, clip.height, clip.width
    s, frames = config.spatial_factor, 1 + (clip.frames - 1) // config.temporal_factor
    return 1, config.z_dim, frames, clip.height // s, clip.width // s


def statistics(config: VAEConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Mean and standard deviation of the latents, [1, C, 1, 1, 1]."""
    return [
        torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    ]


def our_call(vae: WanVAE, direction: str, x: Tensor, tiling: Any = None) -> Call:
    return lambda: getattr(vae, direction)(x, tiling)


def their_call(theirs: Any, config: VAEConfig, direction: str, x: Tensor, tiled: bool = False) -> Call:
    """As ours: encode ends with the normalised mean, decode begins with normalised latents."""
    mean, std = statistics(config, x.device)

    def encode() -> Tensor:
        return ((theirs.encode(x).latent_dist.mode() - mean) / std).to(x.dtype)

    def decode() -> Tensor:
        sample: Tensor = theirs.decode((x * std + mean).to(x.dtype)).sample
        return sample

    def call() -> Tensor:
        theirs.use_tiling = tiled
        return encode() if direction == "encode" else decode()

    return call


def plain(vae: WanVAE, direction: str, x: Tensor) -> Tensor:
    """The same by training's path: plain torch, the whole clip in one piece, no caches."""
    mean, std = statistics(vae.config, x.device, torch.promote_types(x.dtype, torch.float32))
    if direction == "encode":
        return ((vae.encode_moments(x)[0] - mean) / std).to(x.dtype)
    pixels: Tensor = vae.decode_whole((x * std + mean).to(x.dtype))
    return pixels.clamp(-1, 1)


@contextlib.contextmanager
def convolutions_as_measured(vae: WanVAE) -> Iterator[None]:
    """Inside, small convolutions are done by what torch takes for large ones.

    On the CPU it unrolls those of under a million inputs or so into matrix products, which sum in
    another order and round less than oneDNN, which does all of the measured clip.
    """
    if not can_add(vae.device, vae.dtype):
        yield
        return

    def convolve(x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any) -> Tensor:
        dims = weight.ndim - 2
        stride, padding = ((n,) * dims if isinstance(n, int) else tuple(n) for n in (stride, padding))
        x = x.contiguous(memory_format=_FORMATS[dims])
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * dims, 1)

    with mock.patch.object(nnf, "conv3d", convolve), mock.patch.object(nnf, "conv2d", convolve):
        yield


@torch.no_grad()
def check(vae: WanVAE, theirs: Any, clip: Clip = GATE_CLIP) -> dict[str, float]:
    """Errors of both on a small clip against float64. AssertionError: one exceeds its budget.

    The budget of each is what plain torch's own error in the dtype gives it, not the other's: it
    does not shrink as ours gets better.
    """
    exact = copy.deepcopy(vae).double()
    found: dict[str, float] = {}
    for direction in DIRECTIONS:
        x = make_input(vae, direction, clip)
        oracle = plain(exact, direction, x.double())
        with convolutions_as_measured(vae):
            low = plain(vae, direction, x)
        values = {"pusa": our_call(vae, direction, x)()}
        if theirs is not None:
            values["diffusers"] = their_call(theirs, vae.config, direction, x)()
        for name, value in values.items():
            assert_within_budget(value, low, oracle, f"{name}, {direction}")
            found[f"{name} {direction}"] = relative_error(value, oracle)
    return found


@dataclass(frozen=True)
class Layer:
    """A convolution's call: the size of its input [N, C, (T,) H, W], causal frames included."""

    module: Any  # nn.Conv2d or nn.Conv3d
    size: tuple[int, ...]

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(int(p) for p in self.module.padding)

    @property
    def flops(self) -> int:
        m = self.module
        spans = zip(self.size[2:], self.padding, m.kernel_size, m.stride, strict=True)
        places: int = math.prod((length + 2 * pad - k) // stride + 1 for length, pad, k, stride in spans)
        return int(2 * self.size[0] * places * m.in_channels * m.out_channels * math.prod(m.kernel_size))

    def pieces(self) -> Iterator[tuple[int, ...]]:
        """Its size, cut along the frames if too large for one call; pieces overlap as needed."""
        axis, k, stride = (0, 1, 1) if len(self.size) == 4 else (2, self.module.kernel_size[0], self.module.stride[0])
        left = (self.size[axis] - k) // stride + 1
        most = max(1, (_PIECE // (math.prod(self.size) // self.size[axis]) - k) // stride + 1)
        while left > 0:
            now = min(most, left)
            yield (*self.size[:axis], (now - 1) * stride + k, *self.size[axis + 1 :])
            left -= now


def conv_layers(vae: WanVAE, direction: str, clip: Clip) -> list[Layer]:
    """The convolutions of a clip, recorded from the training path on the meta device.

    Raises AssertionError where a convolution of that half was not called as a module: the floor
    would miss it.
    """
    with torch.device("meta"):
        twin = WanVAE(vae.config).eval().requires_grad_(False)
    own = dict(vae.named_modules())
    half = {"encode": ("encoder", "conv1"), "decode": ("decoder", "conv2")}[direction]
    names = [
        name
        for name, module in twin.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and name.split(".")[0] in half
    ]
    layers: list[Layer] = []
    called: set[str] = set()

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Sequence[Tensor], _: Any) -> None:
            size = list(inputs[0].shape)
            size[2] += module.kernel_size[0] - 1 if isinstance(module, CausalConv3d) else 0
            layers.append(Layer(own[name], tuple(size)))
            called.add(name)

        return hook

    for name in names:
        twin.get_submodule(name).register_forward_hook(record(name))
    with torch.no_grad():
        x = torch.empty(input_shape(vae.config, direction, clip), device="meta")
        twin.encode_moments(x) if direction == "encode" else twin.decode_whole(x)
    missed = set(names) - called
    assert not missed, f"convolutions that the training path did not call: {sorted(missed)}"
    return layers


def floor_call(layers: Sequence[Layer], packed: bool = False) -> Call:
    """Every convolution alone, one after the other.

    `packed` (CPU): with weights already in oneDNN's own layout for each input.
    All inputs are views of one random buffer, as large as the largest: outputs are dropped at once,
    so little memory is held.
    """
    weight = layers[0].module.weight
    packed = packed and can_add(weight.device, weight.dtype)  # oneDNN has bf16 on some CPUs only
    room = torch.randn(max(math.prod(size) for layer in layers for size in layer.pieces()), device=weight.device).to(
        weight.dtype
    )
    work = [
        (_packed if packed else _plain)(layer, _channels_last(room, size))
        for layer in layers
        for size in layer.pieces()
    ]

    def call() -> None:
        for convolution in work:
            convolution()

    return call


def _channels_last(room: Tensor, size: tuple[int, ...]) -> Tensor:
    """The front of `room` as [N, C, ..., H, W] with channels innermost."""
    n, c, *space = size
    return room[: math.prod(size)].view(n, *space, c).movedim(-1, 1)


def _plain(layer: Layer, x: Tensor) -> Call:
    m, convolve = layer.module, nnf.conv3d if x.ndim == 5 else nnf.conv2d
    weight = m.weight.to(memory_format=_FORMATS[x.ndim - 2])
    return lambda: convolve(x, weight, m.bias, m.stride, layer.padding)


def _packed(layer: Layer, x: Tensor) -> Call:
    m, mkldnn = layer.module, torch.ops.mkldnn
    padding, stride, dilation = (list(v) for v in (layer.padding, m.stride, m.dilation))
    weight = mkldnn._reorder_convolution_weight(m.weight.contiguous(), padding, stride, dilation, 1, list(x.shape))
    return lambda: mkldnn._convolution_pointwise(x, weight, m.bias, padding, stride, dilation, 1, "none", [], "")
