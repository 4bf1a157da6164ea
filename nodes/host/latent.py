"""The key that Helios adds to a LATENT."""

from __future__ import annotations

from typing import Any

from ...helios_core.config import CHUNK_LATENTS, num_chunks
from ...helios_core.video import VideoState

STATE_KEY = "helios"


def video_state(latent: dict[str, Any]) -> VideoState | None:
    """The state a LATENT carries, or None if it has none or its samples were changed since and no longer fit."""
    state, samples = latent.get(STATE_KEY), latent["samples"]
    if not isinstance(state, VideoState) or samples.shape[2] != num_chunks(state.frames) * CHUNK_LATENTS:
        return None
    if state.memory is not None and state.memory.latents.shape[-2:] != samples.shape[-2:]:
        return None
    return state
