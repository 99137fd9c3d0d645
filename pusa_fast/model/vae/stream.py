"""Inference through the layers of the VAE, piece by piece, without copies to pad or join pieces.

A causal convolution reads a *window*, [B, past + T, H, W, C]: the last frames of the piece before,
then this piece, which the kernel that makes it (norm, SiLU, and the sums before them) writes in
place. The windows of all layers share one buffer, since each is done with before the next is
filled; between pieces a layer keeps only its past frames. Any division of a clip into pieces gives
the same result.

Shapes: [B, T, H, W, C], contiguous unless said otherwise; C' = the layer's output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pusa_fast import ops
from pusa_fast.model.vae.layers import CausalConv3d, Downsample, FrameAttention, Head, ResidualBlock, Upsample
from pusa_fast.ops.vae import convolve, convolve_add_, convolve_frames


class Stream:
    """What the layers of one clip remember between pieces, and the buffer that their windows share.

    `adds`: convolutions add to the residual stream themselves (`ops.vae.can_add`). `last`: the
    piece under way is the clip's last, so that nothing has to be remembered.
    """

    def __init__(self, adds: bool) -> None:
        self.adds, self.last = adds, False
        self._history: dict[nn.Module, Tensor] = {}
        self._phases: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()
        self._room: Tensor | None = None

    def first(self, layer: nn.Module) -> bool:
        """Whether this is the clip's first piece for the layer: True once."""
        new = layer not in self._started
        self._started.add(layer)
        return new

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The shared buffer as a tensor of this shape, contents undefined; it loses what it had."""
        size = math.prod(shape)
        if self._room is None or self._room.numel() < size:
            self._room = None  # released before the larger one is made
            self._room = like.new_empty(size)
        return self._room[:size].view(shape)

    def window(self, layer: nn.Module, past: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """A window for a piece [B, T, H, W, C], and the part of it to write the piece to."""
        B, T, *pixel = shape
        history = self._history.get(layer)
        past = 0 if history is None and T == 1 else past  # a picture: the taps before it would meet zeros
        window = self.room((B, past + T, *pixel), like)
        if past:
            window[:, :past].zero_() if history is None else window[:, :past].copy_(history)
        return window, window[:, past:]

    def remember(self, layer: nn.Module, past: int, window: Tensor) -> None:
        """Keep the last `past` frames of a filled window; frames before the clip are zeros."""
        if self.last or not past:
            return
        B, frames, *pixel = window.shape
        kept = self._history.get(layer)
        if kept is None:
            kept = self._history[layer] = window.new_zeros(B, past, *pixel)
        n = min(past, frames)
        kept[:, past - n :].copy_(window[:, -n:])

    def phases(self, layer: nn.Conv2d) -> Tensor:
        """`upsampling_phases` of a layer's weight, made once per clip."""
        if layer not in self._phases:
            self._phases[layer] = upsampling_phases(layer.weight)
        return self._phases[layer]


@dataclass
class Sum:
    """An activation x + y + bias that nobody has added up yet; each may be missing.

    `phases`: y is [B, T, H/2+1, W/2+1, 4*C], the four phases of an upsampled picture
    (`ops.vae_act_`).
    """

    x: Tensor | None
    y: Tensor | None = None
    bias: Tensor | None = None
    phases: bool = False

    @property
    def any(self) -> Tensor:
        """One of the parts, for its dtype and device."""
        found = self.y if self.x is None else self.x
        assert found is not None, "used up"
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        B, T, H, W, C = self.any.shape
        return (B, T, 2 * (H - 1), 2 * (W - 1), C // 4) if self.phases else (B, T, H, W, C)

    def value(self, into: Tensor | None = None) -> Tensor:
        """The sum, written to `into` if given. Uses it up: this object keeps no memory alive."""
        x, y, r = self._take(into)
        if y is not None:
            ops.vae_act_(y, x=x, bias=self.bias, r=r, upsampled=self.phases)
        elif into is not None:
            into.copy_(r)
        return r if into is None else into

    def normalise(self, gamma: Tensor, out: Tensor, silu: bool = True) -> Tensor:
        """Write the RMS norm over the channels, and SiLU, to `out`; returns the sum. Uses it up."""
        x, y, r = self._take()
        if y is None:
            ops.vae_act_(r, gamma, out=out, silu=silu)
        else:
            ops.vae_act_(y, gamma, out=out, x=x, bias=self.bias, r=r, silu=silu, upsampled=self.phases)
        return r

    def _take(self, into: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """x, y, and where to put the sum: `into`, else a part that it uses up."""
        x, y = self.x, self.y
        r = self.any.new_empty(self.shape) if self.phases and x is None and into is None else self.any
        self.x = self.y = None
        return x, y, r if y is None or into is None else into


def run(layer: nn.Module, value: Sum, stream: Stream) -> Sum:
    """One layer on one piece."""
    return _LAYERS[type(layer)](layer, value, stream)


def pointwise(layer: nn.Module, x: Tensor, channels: int | None = None) -> Tensor:
    """A convolution of a single pixel, with only its first `channels` outputs if given."""
    assert isinstance(layer, (nn.Conv2d, nn.Conv3d)) and layer.bias is not None
    return ops.linear(x, layer.weight.flatten(1)[:channels], layer.bias[:channels])


def upsampling_phases(weight: Tensor) -> Tensor:
    """Nearest doubling and a 3x3 convolution as one of 2x2: [O, C, 3, 3] -> [4*O, C, 2, 2].

    Output row 2i+a reads upsampled rows 2i+a-1 .. 2i+a+1, which are only two rows of the picture:
    i-1, i, i for a = 0 and i, i, i+1 for a = 1; columns alike. Taps that meet the same pixel are
    added (in float32): 16 multiplications a pixel instead of 36.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = torch.stack(
        [torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2), torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)]
    )
    first, second, third = rows.unbind(-1)  # [a, O, C, 2]
    both = torch.stack([torch.stack([first, second + third], -1), torch.stack([first + second, third], -1)], 1)
    return both.flatten(0, 2).to(weight.dtype).contiguous()  # [a, e, O, C, 2, 2]


def _window(layer: CausalConv3d, shape: tuple[int, ...], stream: Stream) -> tuple[Tensor, Tensor]:
    return stream.window(layer, layer.past, shape, layer.weight)


def _causal(layer: CausalConv3d, window: Tensor, stream: Stream, bias: bool = True) -> Tensor:
    stream.remember(layer, layer.past, window)
    return convolve(window, layer.weight, layer.bias if bias else None, layer.kernel_size[-1] // 2)


def _enter(layer: CausalConv3d, value: Sum, stream: Stream) -> Sum:
    """The clip's first convolution; its input may have another dtype and any strides."""
    window, inside = _window(layer, value.shape, stream)
    value.value(into=inside)
    return Sum(_causal(layer, window, stream))


def _head(layers: Head, value: Sum, stream: Stream) -> Sum:
    conv = layers.convolution
    window, inside = _window(conv, value.shape, stream)
    value.normalise(layers.norm.gamma, inside)
    return Sum(_causal(conv, window, stream))


def _residual_block(block: ResidualBlock, value: Sum, stream: Stream) -> Sum:
    norm1, conv1, norm2, conv2 = block.parts
    window, inside = _window(conv1, value.shape, stream)
    x = value.normalise(norm1.gamma, inside)
    x = x.contiguous() if isinstance(block.shortcut, nn.Identity) else pointwise(block.shortcut, x)
    y = _causal(conv1, window, stream, bias=stream.adds)
    window, inside = _window(conv2, tuple(y.shape), stream)
    ops.vae_act_(y, norm2.gamma, out=inside, bias=None if stream.adds else conv1.bias)
    del y
    if not stream.adds:
        return Sum(x, _causal(conv2, window, stream, bias=False), conv2.bias)
    stream.remember(conv2, conv2.past, window)
    convolve_add_(x, window, conv2.weight, conv2.bias, conv2.kernel_size[-1] // 2)
    return Sum(x)


def _frame_attention(layer: FrameAttention, value: Sum, stream: Stream) -> Sum:
    B, T, H, W, C = value.shape
    normed = stream.room(value.shape, value.any)
    x = value.normalise(layer.norm.gamma, normed, silu=False)
    qkv = pointwise(layer.to_qkv, normed).view(B * T, 1, H * W, 3 * C)
    q, k, v = qkv.chunk(3, dim=-1)
    attended = nnf.scaled_dot_product_attention(q, k, v).view(B, T, H, W, C)
    return Sum(x, pointwise(layer.proj, attended))


def _downsample(layer: Downsample, value: Sum, stream: Stream) -> Sum:
    B, T, H, W, C = value.shape
    padded = stream.room((B, T, H + 1, W + 1, C), value.any)
    padded[:, :, H:].zero_()
    padded[:, :, :, W:].zero_()
    value.value(into=padded[:, :, :H, :W])
    conv = layer.convolution
    x = convolve_frames(padded, conv.weight, conv.bias, stride=2)
    return Sum(x if layer.time_conv is None else _halve_frames(layer.time_conv, x, stream))


def _halve_frames(conv: nn.Conv3d, x: Tensor, stream: Stream) -> Tensor:
    """The clip's first frame is kept; each later pair is merged with the frame before it."""
    first = stream.first(conv)
    if first:
        window = x
    else:
        window, inside = stream.window(conv, 1, tuple(x.shape), x)
        inside.copy_(x)
    stream.remember(conv, 1, window)
    if window.shape[1] == 1:
        return x
    merged = convolve(window, conv.weight, conv.bias, stride=cast(Any, conv.stride))
    return torch.cat([x[:, :1], merged], dim=1) if first else merged


def _upsample(layer: Upsample, value: Sum, stream: Stream) -> Sum:
    x = value.value()
    if layer.time_conv is not None:
        x = _double_frames(layer.time_conv, x, stream)
    y = convolve_frames(x.contiguous(), stream.phases(layer.convolution), None, padding=1)
    return Sum(None, y, layer.convolution.bias, phases=True)


def _double_frames(conv: CausalConv3d, x: Tensor, stream: Stream) -> Tensor:
    """The clip's first frame is neither doubled nor part of the history of later ones."""
    B, T, H, W, C = x.shape
    alone = 1 if stream.first(conv) else 0
    doubled = x.new_empty(B, alone + 2 * (T - alone), H, W, C)
    doubled[:, :alone].copy_(x[:, :alone])
    if alone < T:
        window, inside = _window(conv, (B, T - alone, H, W, C), stream)
        inside.copy_(x[:, alone:])
        pairs = _causal(conv, window, stream).view(B, T - alone, H, W, 2, C)
        torch.unflatten(doubled[:, alone:], 1, (T - alone, 2)).copy_(pairs.permute(0, 1, 4, 2, 3, 5))
    return doubled


_LAYERS: dict[type[nn.Module], Callable[[Any, Sum, Stream], Sum]] = {
    CausalConv3d: _enter,
    Head: _head,
    ResidualBlock: _residual_block,
    FrameAttention: _frame_attention,
    Downsample: _downsample,
    Upsample: _upsample,
}
