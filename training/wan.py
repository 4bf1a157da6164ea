"""The Wan 2.1 VAE over whole clips: diffusers' modules and weights, evaluated frame by frame as 2-D convolutions.

diffusers feeds an AutoencoderKLWan four frames at a time through caches; here all frames of a clip go through each
layer together, as images stacked in the batch, with the taps of a causal 3-D kernel as further input channels. That is
the same function, several times faster on a CPU, and for single images only the last tap is left.

Tensors are (B * T, C, H, W) in channels-last order; `frames` is T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """video: (B, T, 3, H, W) in -1..1, T = 1 + 4n -> mean and log variance, each (B, 1 + n, 16, H / 8, W / 8)."""
    batch, frames = video.shape[:2]
    x = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    encoder = vae.encoder
    x = _conv(encoder.conv_in, x, frames)
    for layer in encoder.down_blocks:
        if hasattr(layer, "resample"):
            x, frames = _downsample(layer, x, frames)
        else:
            x = _residual(layer, x, frames)
    x = _middle(encoder.mid_block, x, frames)
    x = _conv(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)), frames)
    x = _conv(vae.quant_conv, x, frames)
    mean, log_variance = x.unflatten(0, (batch, frames)).chunk(2, dim=2)
    return mean, log_variance


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """latents: (B, 1 + n, 16, H, W), not normalised -> (B, 1 + 4n, 3, 8H, 8W), not clamped."""
    batch, frames = latents.shape[:2]
    x = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    decoder = vae.decoder
    x = _conv(vae.post_quant_conv, x, frames)
    x = _conv(decoder.conv_in, x, frames)
    x = _middle(decoder.mid_block, x, frames)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x, frames)
        if block.upsamplers is not None:
            x, frames = _upsample(block.upsamplers[0], x, frames)
    x = _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)), frames)
    return x.unflatten(0, (batch, frames))


def _conv(layer: nn.Conv3d, x: Tensor, frames: int) -> Tensor:
    """A causal convolution, which sees zeros before the first frame."""
    taps, height, width = layer.kernel_size
    weight = layer.weight
    if taps == 1 or frames == 1:
        return F.conv2d(x, weight[:, :, -1], layer.bias, padding=(height // 2, width // 2))
    weight = weight.transpose(1, 2).flatten(1, 2)  # (out, taps * in, height, width)
    return F.conv2d(_stack(x, frames, taps), weight, layer.bias, padding=(height // 2, width // 2))


def _stack(x: Tensor, frames: int, taps: int) -> Tensor:
    """Each frame with the ones before it as channels, oldest first: (B * T, C, H, W) -> (B * T, taps * C, H, W)."""
    x = x.unflatten(0, (-1, frames))
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, taps - 1, 0))
    shifted = torch.cat([padded[:, tap : tap + frames] for tap in range(taps)], dim=2)
    return shifted.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    scale = layer.scale * layer.gamma.flatten().view(1, -1, 1, 1)
    return x * (x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * scale).to(x.dtype)


def _residual(layer: nn.Module, x: Tensor, frames: int) -> Tensor:
    skip = x if isinstance(layer.conv_shortcut, nn.Identity) else _conv(layer.conv_shortcut, x, frames)
    x = _conv(layer.conv1, F.silu(_norm(layer.norm1, x)), frames)
    return skip + _conv(layer.conv2, F.silu(_norm(layer.norm2, x)), frames)


def _middle(block: nn.Module, x: Tensor, frames: int) -> Tensor:
    x = _residual(block.resnets[0], x, frames)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        query, key, value = attention.to_qkv(_norm(attention.norm, x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).unflatten(2, x.shape[2:])
        x = _residual(layer, x + attention.proj(seen), frames)
    return x


def _downsample(layer: nn.Module, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """Half the height and width and, but for the first frame, half the frames."""
    x = layer.resample(x)
    if layer.mode != "downsample3d" or frames == 1:
        return x, frames
    x = x.unflatten(0, (-1, frames))
    conv = layer.time_conv
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # (out, 3 * in, 1, 1)
    triples = torch.cat([x[:, tap : frames - 2 + tap : 2] for tap in range(3)], dim=2)
    halved = F.conv2d(triples.flatten(0, 1), weight, conv.bias).unflatten(0, (len(x), -1))
    x = torch.cat([x[:, :1], halved], dim=1)
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last), x.shape[1]


def _upsample(layer: nn.Module, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """Double the height and width and, but for the first frame, the frames; the others do not see the first."""
    if layer.mode == "upsample3d" and frames > 1:
        x = x.unflatten(0, (-1, frames))
        first, rest = x[:, :1], x[:, 1:].flatten(0, 1)
        rest = _conv(layer.time_conv, rest, frames - 1)  # two frames out of each, one after the other in channels
        rest = rest.unflatten(1, (2, -1)).unflatten(0, (len(x), -1)).flatten(1, 2)
        x = torch.cat([first, rest], dim=1)
        frames = x.shape[1]
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    return layer.resample[1](x), frames
