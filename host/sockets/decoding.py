"""Decoding with the host's VAE, one chunk at a time."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, SPATIAL_SCALE
from ..out_of_memory import lack_of_room
from ..progress import check_interrupt
from .latent import asked_frames, carried_state, check_latent, is_empty
from .vae import WANTED


def decode_chunk(vae: Any, samples: Tensor) -> Tensor:
    """One item's chunk (1, 16, 9, H, W) in VAE space -> its 33 frames (33, 8H, 8W, 3) in 0..1."""
    frames = vae.decode(samples)[0]
    expected = (CHUNK_FRAMES, *(side * SPATIAL_SCALE for side in samples.shape[3:]), 3)
    if tuple(frames.shape) != expected:
        raise ValueError(
            f"The VAE made images of the shape {tuple(frames.shape)}; expected {expected}. Connect {WANTED}."
        )
    return frames


def shown_frames(latent: dict[str, Any], chunks: int, trim: bool, drop_first: int) -> tuple[int, int]:
    """First and end of the frames to show of a LATENT of so many chunks; ValueError where none would be left."""
    end = (trim and asked_frames(latent)) or chunks * CHUNK_FRAMES
    if drop_first >= end:
        raise ValueError(f"drop_first is {drop_first}, but the video has {end} frames. Set it to {end - 1} or less.")
    return drop_first, end


def trim_warning(latent: dict[str, Any], trim: bool) -> str | None:
    """The decoders' warning where `trim` cannot cut; None where it can, or is off."""
    if not trim or asked_frames(latent) is not None:
        return None
    return (
        "Not trimmed: the LATENT does not say how many frames were asked for (Save Latent, and nodes that change its "
        "length, drop that). Cut the images, or decode before that node."
    )


def unsampled_warning(latent: dict[str, Any]) -> str | None:
    """The decoder's warning of a LATENT straight from Helios History Injection; None for any other."""
    state = carried_state(latent)
    if state is None or state.memory is not None or not is_empty(latent["samples"]):
        return None
    return (
        "The video shows nothing: this LATENT was never sampled. Connect that of Helios Chunked Sampler, and take it "
        "out of bypass, which hands the empty one on."
    )


def too_many_frames(batch: int, frames: int, height: int, width: int) -> str | None:
    """That so many images (8H, 8W) of latents (H, W) cannot be held at once, in words; None where they can."""
    height, width = height * SPATIAL_SCALE, width * SPATIAL_SCALE
    return lack_of_room(
        f"{batch * frames} frames of {width}x{height}",
        batch * frames * height * width * 3 * torch.float32.itemsize,
        comfy.model_management.intermediate_device(),
        "Take Helios Stream Video, whose memory does not grow with the length, or decode fewer frames.",
    )


def decode_chunks(
    latent: dict[str, Any], vae: Any, trim: bool = False, drop_first: int = 0, crossfade: int = 0
) -> Tensor:
    """A LATENT's samples (B, 16, 9k, H, W) -> images (B * frames, 8H, 8W, 3) in 0..1, allocated once.

    The VAE is causal and a chunk's first latent is image-like, so chunks never see each other. `trim` cuts to the
    frames asked for, then `drop_first` takes frames off the beginning. `crossfade` frames of each chunk but the first
    come out of the last frame before it, which hides a jump and keeps the length.
    """
    samples = check_latent(latent, "latent")
    batch, chunks = samples.shape[0], samples.shape[2] // CHUNK_LATENTS
    first, end = shown_frames(latent, chunks, trim, drop_first)
    if lack := too_many_frames(batch, end - first, *samples.shape[3:]):
        raise ValueError(lack)

    bar = comfy.utils.ProgressBar(batch * chunks)
    images: Tensor | None = None
    for item in range(batch):
        last = None
        for chunk in range(chunks):
            check_interrupt()
            part = samples[item : item + 1, :, chunk * CHUNK_LATENTS : (chunk + 1) * CHUNK_LATENTS]
            pixels = decode_chunk(vae, part)
            if images is None:
                shape = (batch, end - first, *pixels.shape[1:])
                images = torch.empty(shape, dtype=pixels.dtype, device=pixels.device)
            if crossfade and last is not None:
                weight = torch.arange(1, crossfade + 1, device=pixels.device).view(-1, 1, 1, 1) / (crossfade + 1)
                fade = torch.lerp(last, pixels[:crossfade], weight.to(pixels.dtype))
                pixels = torch.cat([fade, pixels[crossfade:]])
            last = pixels[-1].clone() if crossfade else None
            start = chunk * CHUNK_FRAMES - first  # where this chunk's first frame belongs
            kept = pixels[max(0, -start) : max(0, end - first - start)]
            images[item, max(0, start) : max(0, start) + len(kept)] = kept
            bar.update(1)
    assert images is not None
    return images.flatten(0, 1)
