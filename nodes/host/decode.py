"""Decoding with the host's VAE, one chunk at a time."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS
from .latent import video_state
from .progress import check_interrupt


def decode_chunks(latent: dict[str, Any], vae: Any, trim: bool) -> Tensor:
    """A LATENT's samples (B, 16, 9k, H, W) -> images (B * frames, 8H, 8W, 3) in 0..1, allocated once.

    The VAE is causal and a chunk's first latent is image-like, so chunks never see each other.
    """
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[2] % CHUNK_LATENTS:
        raise ValueError(
            f"The LATENT has the shape {tuple(samples.shape)}; expected (batch, 16, a multiple of {CHUNK_LATENTS}, "
            "height, width), as Helios Chunked Sampler makes it."
        )
    batch, chunks = samples.shape[0], samples.shape[2] // CHUNK_LATENTS
    state = video_state(latent)
    frames = state.frames if trim and state else chunks * CHUNK_FRAMES

    bar = comfy.utils.ProgressBar(batch * chunks)

    def decode(item: int, chunk: int) -> Tensor:
        check_interrupt()
        part = samples[item : item + 1, :, chunk * CHUNK_LATENTS : (chunk + 1) * CHUNK_LATENTS]
        pixels = vae.decode(part)[0]  # (33, 8H, 8W, 3)
        bar.update(1)
        return pixels[: frames - chunk * CHUNK_FRAMES]

    first = decode(0, 0)
    images = torch.empty((batch, frames, *first.shape[1:]), dtype=first.dtype, device=first.device)
    images[0, : len(first)] = first
    del first
    for item, chunk in itertools.islice(itertools.product(range(batch), range(chunks)), 1, None):
        start = chunk * CHUNK_FRAMES
        images[item, start : start + CHUNK_FRAMES] = decode(item, chunk)
    return images.flatten(0, 1)
