"""LATENT sockets: checked, brought to normalised space and back, with the state of a video beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import comfy.latent_formats
import comfy.model_management
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS, num_chunks
from ...helios_core.history import HistoryLayout, Memory, keep_last
from ...helios_core.video import VideoStart, VideoState

STATE_KEY = "helios"
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def normalise(latents: Tensor) -> Tensor:
    """From VAE space, as on LATENT sockets, to the normalised space of the core; float32 on the CPU."""
    return comfy.latent_formats.Wan21().process_in(latents.float().cpu())


def to_vae_space(latents: Tensor) -> Tensor:
    """From normalised space to VAE space, as LATENT sockets have it: float32 on the host's intermediate device."""
    latents = latents.to(comfy.model_management.intermediate_device())
    return comfy.latent_formats.Wan21().process_out(latents.float())


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with numbers of its own: no nested or sparse one, none that is only described."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_nested or value.is_meta)


def check_latent(latent: Any, socket: str, *, values: bool = True, whole_chunks: bool = True) -> Tensor:
    """The samples (B, 16, T, H, W) of a LATENT, T in whole chunks of 9. Raises ValueError, with the socket's name.

    Without `values` its numbers do not count, as where only its shape does.
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not is_plain(samples):
        raise ValueError(
            f"`{socket}` got no LATENT with one tensor of samples. Connect Helios History Injection or Helios Chunked "
            "Sampler."
        )
    shape, frames = tuple(samples.shape), f"a multiple of {CHUNK_LATENTS}" if whole_chunks else "frames"
    if (
        len(shape) != 5
        or shape[1] != LATENT_CHANNELS
        or (whole_chunks and shape[2] % CHUNK_LATENTS)
        or not samples.numel()
    ):
        raise ValueError(
            f"The LATENT on `{socket}` has the shape {shape}; expected (batch, {LATENT_CHANNELS}, {frames}, height / 8,"
            " width / 8), as Helios History Injection and Helios Chunked Sampler make it."
        )
    if samples.dtype not in LATENT_DTYPES:
        raise ValueError(
            f"The LATENT on `{socket}` holds {samples.dtype}; expected numbers in float32, or in 16 bits. Connect it "
            "as Helios Chunked Sampler makes it."
        )
    if values and not torch.stack(samples.aminmax()).isfinite().all():
        raise ValueError(
            f"The LATENT on `{socket}` holds NaN or infinite values: what made it went wrong. Make it anew, with "
            "another dtype or without a LoRA."
        )
    return samples


def carried_state(latent: dict[str, Any]) -> VideoState | None:
    """The state a LATENT carries, whether or not its samples still fit; None if it has none."""
    state = latent.get(STATE_KEY)
    return state if isinstance(state, VideoState) else None


def asked_frames(latent: dict[str, Any]) -> int | None:
    """How many frames were asked for, before rounding up to whole chunks; None where the LATENT does not tell.

    It goes by the length alone: what was done to samples in height, width or value does not change it.
    """
    state = carried_state(latent)
    if state is None or latent["samples"].shape[2] != num_chunks(state.frames) * CHUNK_LATENTS:
        return None
    return state.frames


def video_state(latent: dict[str, Any]) -> VideoState | None:
    """The state a LATENT carries, or None if it has none or its samples were changed since and no longer fit."""
    if asked_frames(latent) is None:
        return None
    state: VideoState = latent[STATE_KEY]
    if state.memory is not None and not _ends_in(latent["samples"], state.memory):
        return None
    return state


def is_empty(samples: Tensor) -> bool:
    """Whether there is nothing but zeros in samples, such as Helios History Injection makes them."""
    # A single zero in any shape: what repeats it is not looked at.
    once = samples[tuple(slice(1) if stride == 0 else slice(None) for stride in samples.stride())]
    return not once.any()


def _ends_in(samples: Tensor, memory: Memory) -> bool:
    """Whether samples (B, 16, 9k, H, W) end in this memory: nodes that change samples hand the old memory on."""
    frames = min(CHUNK_LATENTS, memory.latents.shape[2])
    shown, kept = samples[:, :, -frames:], memory.latents[:, :, -frames:]
    return shown.shape == kept.shape and torch.allclose(normalise(shown), kept, atol=1e-3)


def _shown_by(layout: HistoryLayout, memory: Memory, latent: dict[str, Any]) -> Memory:
    """A LATENT's memory, and of its samples the older frames that this layout shows and that run did not keep.

    Raises ValueError where some are needed and the samples hold NaN.
    """
    kept = memory.latents.shape[2]
    if layout.frames <= kept:
        return memory
    samples = check_latent(latent, "previous", whole_chunks=False)
    length = samples.shape[2]
    older = normalise(samples[:, :, max(0, length - layout.frames) : max(0, length - kept)])
    return replace(memory, latents=torch.cat([older, memory.latents], dim=2)).with_layout(layout)


def follow(start: VideoStart, latent: dict[str, Any]) -> tuple[VideoStart, Memory, bool]:
    """The start of a video that goes on from a LATENT, the memory it goes on from, and whether the LATENT carried it.

    A LATENT that lost its key, as the host's Save Latent drops it, is followed on from its last latents: the anchor is
    then its first one, and how its noise was drawn is not known. Raises ValueError for one that was never sampled.
    """
    samples = check_latent(latent, "previous", values=False, whole_chunks=False)
    carried, state = carried_state(latent), video_state(latent)
    if state is not None and state.memory is not None:
        memory = _shown_by(start.layout, state.memory, latent)
        return replace(start, source=memory, first_index=state.next_chunk, rng_state=state.rng_state), memory, True
    if carried is not None and carried.memory is None:
        raise ValueError(
            "The LATENT on `previous` was never sampled: it comes straight from Helios History Injection. "
            "Connect the latent of a Helios Chunked Sampler."
        )
    latents = normalise(check_latent(latent, "previous", whole_chunks=False))
    memory = Memory(keep_last(latents, start.layout.frames), latents[:, :, :1], start.layout)
    return replace(start, source=memory, first_index=max(1, samples.shape[2] // CHUNK_LATENTS)), memory, False
