"""What decoding a chunk costs in the Wan 2.1 VAE of the real size, on random weights: dtype, memory format, batch.

Every way is compared with one chunk at a time in float32, and its frames with those: their PSNR is over the range of
the float32 frames, and with random weights says only how the arithmetic rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import Compare, Row
from torch import Tensor, nn

WAYS = {  # dtype, 3D convolutions channels-last, chunks at once
    "decode_batch_2": (torch.float32, False, 2),
    "decode_channels_last": (torch.float32, True, 1),
    "decode_bf16": (torch.bfloat16, False, 1),
    "decode_bf16_batch_2": (torch.bfloat16, False, 2),
    "decode_bf16_channels_last": (torch.bfloat16, True, 1),
}

Decode = Callable[[Any, Tensor], Tensor]
"""decoder, latents (B, 16, 9, h, w) -> frames (B, 3, 33, 8h, 8w)."""


def random_vae(**size: Any) -> Any:
    """diffusers' Wan VAE as it is initialised, of the real size if nothing else is asked for."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(z_dim=16, **size).eval().requires_grad_(False)


def by_diffusers(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def rows(decoder: nn.Module, decode: Decode, chunk: Tensor, compare: Compare) -> Iterator[Row]:
    """Seconds a chunk, of every way to run this decoder; it and the chunk (1, 16, 9, h, w) are in float32."""
    expected = decode(decoder, chunk)
    for name, (dtype, channels_last, batch) in WAYS.items():
        other = copy.deepcopy(decoder).to(dtype)
        latents = chunk.to(dtype).expand(batch, *chunk.shape[1:]).contiguous()
        if channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)
            for weight in other.parameters():
                if weight.ndim == 5:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

        def way(other: nn.Module = other, latents: Tensor = latents) -> Tensor:
            return decode(other, latents)

        note = f"peer: one chunk in float32; PSNR {psnr(way()[:1], expected):.1f} dB"
        ours, theirs = compare(way, lambda: decode(decoder, chunk))
        yield Row.compare(name, ours / batch, theirs, "s", note)


def psnr(frames: Tensor, expected: Tensor) -> float:
    """In dB; infinite where they are the same."""
    error = (frames.float() - expected).square().mean().item()
    span = (expected.max() - expected.min()).item()
    return 20 * math.log10(span) - 10 * math.log10(error) if error else math.inf
