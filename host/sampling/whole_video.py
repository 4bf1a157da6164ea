"""All chunks of a run in one tensor."""

from __future__ import annotations

import comfy.model_management
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_LATENTS
from ...helios_core.generate import Chunk
from ..out_of_memory import check_room
from ..sockets.latent import to_vae_space
from .guider import HeliosGuider


def collect(guider: HeliosGuider) -> Tensor:
    """Run the guider; latents (B, 16, 9 * chunks, H, W) in VAE space, float32, on the host's intermediate device."""
    b, channels, frames, height, width = guider.run.chunk_shape
    device = comfy.model_management.intermediate_device()
    needed = torch.float32.itemsize * b * channels * frames * guider.run.chunks * height * width
    check_room(f"The latents of {guider.run.chunks} chunks", needed, device)
    video = torch.empty((b, channels, frames * guider.run.chunks, height, width), device=device)

    def keep(chunk: Chunk) -> None:
        position = (chunk.index - guider.run.first_index) * CHUNK_LATENTS
        video[:, :, position : position + CHUNK_LATENTS] = to_vae_space(chunk.latents)

    guider.denoise(keep)
    return video
