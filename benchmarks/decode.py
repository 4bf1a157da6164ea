"""What decoding a chunk costs in the Wan 2.1 VAE of the real size, on random weights: dtype, memory format, batch.

Every way is compared with one chunk at a time in float32, and its frames with those: their PSNR is over the range of
the float32 frames, and with random weights says only how the arithmetic rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import paths
import profile_gpu
import torch
from card import Shape, device, median, random
from measure import Compare, Row
from parts import MissingError
from torch import Tensor, nn

from helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS

WAYS = {  # dtype, 3D convolutions channels-last, chunks at once
    "decode_batch_2": (torch.float32, False, 2),
    "decode_channels_last": (torch.float32, True, 1),
    "decode_bf16": (torch.bfloat16, False, 1),
    "decode_bf16_batch_2": (torch.bfloat16, False, 2),
    "decode_bf16_channels_last": (torch.bfloat16, True, 1),
}

Decode = Callable[[Any, Tensor], Tensor]
"""decoder, latents (B, 16, 9, h, w) -> frames (B, 3, 33, 8h, 8w)."""


def random_vae(dim: int = 96, **size: Any) -> Any:
    """diffusers' Wan VAE as it is initialised, of the real size if nothing else is asked for."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=dim, z_dim=16, **size).eval().requires_grad_(False)


def by_diffusers(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def host_vae(dim: int, **size: Any) -> Any:
    """ComfyUI's own Wan VAE with random weights; ImportError where there is no ComfyUI, or not all it needs."""
    paths.add_comfyui()
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    from comfy.ldm.wan.vae import WanVAE

    torch.manual_seed(0)
    vae = WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True], **size)
    for layer in vae.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):  # the host's own leave their weights as the memory was
            nn.modules.conv._ConvNd.reset_parameters(layer)
    return vae.eval().requires_grad_(False)


def by_host(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).clamp(-1, 1)


@dataclass(frozen=True)
class Decoder:
    """A VAE on the GPU, or the CPU where there is none."""

    label: str
    vae: Any
    decode: Decode
    channels_last: bool = False

    def __call__(self, latents: Tensor) -> Tensor:
        if self.channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)
        return self.decode(self.vae, latents)

    def converted(self, dtype: torch.dtype, channels_last: bool) -> Decoder:
        vae = converted(self.vae, dtype, channels_last)
        return replace(self, vae=vae, channels_last=channels_last)


def find(size: dict[str, Any], device: torch.device) -> Decoder:
    """The host's VAE in float32, or diffusers'; MissingError where there is neither."""
    try:
        return Decoder("ComfyUI", host_vae(**size).to(device), by_host)
    except ImportError as error:
        lacking = error.name
    try:
        return Decoder("diffusers", random_vae(**size).to(device), by_diffusers)
    except ImportError as error:
        raise MissingError(f"no VAE: neither ComfyUI ({lacking}) nor {error.name} can be imported") from error


def on_card(decoder: Decoder, chunk: Tensor, turns: int) -> Generator[Row, None, Decoder]:
    """One chunk (1, 16, 9, h, w), float32, in float32 and by ways in bf16; returns the fastest of these.

    Float32 is exactly that, without the TensorFloat-32 that torch allows in convolutions.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = decoder(chunk)
        exact = median(lambda: decoder(chunk), 1)
    yield Row("decode_fp32", exact, None, "s")
    fastest: tuple[float, Decoder] = (math.inf, decoder)
    for name, (dtype, channels_last, batch) in WAYS.items():
        if dtype != torch.bfloat16 or batch != 1:
            continue
        other = decoder.converted(dtype, channels_last)
        note = f"peer: float32; PSNR {psnr(other(chunk.to(dtype)), expected):.1f} dB"
        took = median(partial(other, chunk.to(dtype)), turns)
        yield Row.compare(name, took, exact, "s", note)
        fastest = min(fastest, (took, other), key=lambda pair: pair[0])
    return fastest[1]


def closer(shape: Shape, file: Path) -> Iterator[Row]:
    """A chunk in bf16: where its time goes, channels-last and, the peer, not; and what compiling the decoder gains."""
    exact = find(shape.vae, device())
    plain, last = (exact.converted(torch.bfloat16, channels_last) for channels_last in (False, True))
    chunk = random(1, LATENT_CHANNELS, CHUNK_LATENTS, *shape.decoded)
    ours, theirs = profile_gpu.profile(partial(last, chunk)), profile_gpu.profile(partial(plain, chunk))
    file.unlink(missing_ok=True)
    profile_gpu.append(file, {"decode, channels-last": ours, "decode, plain": theirs})
    yield from profile_gpu.rows("profile_decode", ours, theirs, "plain")
    took, frames = median(partial(last, chunk), shape.turns), last(chunk)
    last.vae.decoder = torch.compile(last.vae.decoder, backend=shape.compiler, dynamic=False)
    compiled = median(partial(last, chunk), shape.turns)
    note = f"peer: eager; PSNR {psnr(last(chunk), frames):.1f} dB"
    yield Row.compare("decode_bf16_channels_last_compiled", compiled, took, "s", note)


def rows(decoder: nn.Module, decode: Decode, chunk: Tensor, compare: Compare) -> Iterator[Row]:
    """Seconds a chunk, of every way to run this decoder; it and the chunk (1, 16, 9, h, w) are in float32."""
    expected = decode(decoder, chunk)
    for name, (dtype, channels_last, batch) in WAYS.items():
        other = converted(decoder, dtype, channels_last)
        latents = chunk.to(dtype).expand(batch, *chunk.shape[1:]).contiguous()
        if channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)

        def way(other: nn.Module = other, latents: Tensor = latents) -> Tensor:
            return decode(other, latents)

        note = f"peer: one chunk in float32; PSNR {psnr(way()[:1], expected):.1f} dB"
        ours, theirs = compare(way, lambda: decode(decoder, chunk))
        yield Row.compare(name, ours / batch, theirs, "s", note)


def converted(vae: Any, dtype: torch.dtype, channels_last: bool) -> Any:
    """A copy of a VAE in dtype."""
    other = copy.deepcopy(vae).to(dtype)
    if channels_last:
        for weight in other.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return other


def psnr(frames: Tensor, expected: Tensor) -> float:
    """In dB; infinite where they are the same."""
    error = (frames.float() - expected).square().mean().item()
    span = (expected.max() - expected.min()).item()
    return 20 * math.log10(span) - 10 * math.log10(error) if error else math.inf
