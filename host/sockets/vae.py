"""The VAE on VAE sockets: the shapes of Wan 2.1's, and no others."""

from __future__ import annotations

from typing import Any

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, LATENT_CHANNELS, SPATIAL_SCALE

WANTED = (
    f"the Wan 2.1 VAE (for video, {LATENT_CHANNELS} channels, {SPATIAL_SCALE}x in space, {CHUNK_LATENTS} latents for "
    f"{CHUNK_FRAMES} frames): the Helios folder's own, or wan_2.1_vae.safetensors"
)


def check_vae(vae: Any) -> None:
    """Raise ValueError, before anything is sampled or encoded, for a VAE that is not of Wan 2.1's shape.

    What a VAE does not tell of itself, its results will: those are checked too.
    """
    found = _other_shape(vae)
    if found is None and (isinstance(vae, bytes) or not hasattr(vae, "decode")):  # bytes have one, too
        found = f"input got a value of the type {type(vae).__name__}"
    if found:
        raise ValueError(f"The VAE {found}; expected {WANTED}. Connect that one.")


def _other_shape(vae: Any) -> str | None:
    """What sets the host's VAE apart from Wan 2.1's; None if nothing does."""
    if getattr(vae, "latent_dim", 3) != 3:
        return "is one for images or sound, not for video"
    if (channels := getattr(vae, "latent_channels", LATENT_CHANNELS)) != LATENT_CHANNELS:
        return f"has latents of {channels} channels"
    match getattr(vae, "upscale_ratio", None):
        case (time, height, width):
            frames = time(CHUNK_LATENTS)
            if (frames, height, width) != (CHUNK_FRAMES, SPATIAL_SCALE, SPATIAL_SCALE):
                return f"makes {frames} frames of {CHUNK_LATENTS} latents, {width}x wider and {height}x higher"
    return None
