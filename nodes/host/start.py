"""From a sampling node's inputs to a guider that is ready to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, LATENT_CHANNELS, SPATIAL_SCALE
from ...helios_core.schedule import Schedule
from ...helios_core.video import HistorySeed, VideoState
from .conditioning import find_history
from .guider import HeliosGuider
from .latent import STATE_KEY, video_state
from .model import FlowSampling, HeliosModel
from .prompts import find_track

UNSUPPORTED = {
    "area": "area conditioning",
    "mask": "masked conditioning",
    "control": "ControlNet",
    "gligen": "GLIGEN",
}


def prepare(
    node: str,
    model: Any,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    schedule: Schedule,
    seed: int,
    seed_mode: str,
) -> HeliosGuider:
    """Check the inputs of the node of this name and draw what comes before the first chunk. Nothing is loaded yet.

    Raises ValueError for what cannot be sampled.
    """
    samples = latent["samples"]
    chunks = check_sampling(node, model, positive, negative, samples, schedule)
    history_seed = find_history(positive)
    rng = make_rng(history_seed, seed, seed_mode)
    batch, _, _, height, width = samples.shape
    guider = HeliosGuider(
        model,
        schedule,
        history_seed.start(batch, height, width, rng),
        chunks,
        rng,
        first_index=history_seed.first_index,
        skip_first_chunk=history_seed.skip_first_chunk,
    )
    guider.set_conds(positive, negative)
    return guider


def check_sampling(
    node: str, model_patcher: Any, positive: list, negative: list, latents: Tensor, schedule: Schedule
) -> int:
    """How many chunks the node of this name is to sample.

    Raises ValueError, before anything is loaded, for what cannot be sampled.
    """
    if not isinstance(model_patcher.model, HeliosModel):
        raise ValueError(
            f"{node} needs a Helios model, got {type(model_patcher.model).__name__}. "
            "Load one with Helios Model Loader or Helios Diffusers Loader."
        )
    if not isinstance(model_patcher.get_model_object("model_sampling"), FlowSampling):
        raise ValueError(
            "The MODEL went through a node that replaces its sampling (such as ModelSamplingSD3). "
            "Take that node out: the shift of Helios is part of its schedule."
        )
    if not positive:
        raise ValueError("The positive conditioning is empty. Connect a prompt through Helios History Injection.")
    for name, conditioning in (("positive", positive), ("negative", negative)):
        found = next((UNSUPPORTED[key] for _, values in conditioning for key in UNSUPPORTED if key in values), None)
        if found:
            raise ValueError(f"{node} does not support {found} ({name}). Take it out of the graph.")
        width = model_patcher.model.diffusion_model.config.text_dim
        wrong = next((tuple(embedding.shape) for embedding, _ in conditioning if embedding.shape[-1] != width), None)
        if wrong:
            raise ValueError(
                f"The {name} conditioning is {wrong[-1]} wide, the model expects {width}. Encode the prompt with the "
                "UMT5-XXL text encoder (CLIPLoader of type wan, or Helios Diffusers Loader)."
            )
    if (
        latents.ndim != 5
        or latents.shape[1] != LATENT_CHANNELS
        or latents.shape[2] % CHUNK_LATENTS
        or not latents.numel()
    ):
        raise ValueError(
            f"The LATENT has the shape {tuple(latents.shape)}; expected (batch, {LATENT_CHANNELS}, a multiple of "
            f"{CHUNK_LATENTS}, height / 8, width / 8). Make it with Helios History Injection."
        )
    schedule.check_size(latents.shape[-2] * SPATIAL_SCALE, latents.shape[-1] * SPATIAL_SCALE)
    chunks = latents.shape[2] // CHUNK_LATENTS
    track = find_track(positive)
    if track and sum(track.chunks) > chunks:
        raise ValueError(
            f"The prompts last {sum(track.chunks)} chunks, but the video has {chunks} ({chunks * CHUNK_FRAMES} frames)."
            " Connect the prompt schedule's frames to Helios History Injection, or shorten the prompts."
        )
    return chunks


def make_rng(history_seed: HistorySeed, seed: int, seed_mode: str) -> torch.Generator:
    """The generator of a run, on the CPU: the one of the video that goes on, or a new one."""
    if seed_mode not in ("continue", "new"):
        raise ValueError(f"seed_mode must be continue or new, got {seed_mode!r}.")
    rng = torch.Generator().manual_seed(seed)
    if seed_mode == "continue" and history_seed.rng_state is not None:
        rng.set_state(history_seed.rng_state)
    return rng


def variant_warning(model: Any, schedule: Schedule) -> str | None:
    """What to say of a schedule that is not that of the model's variant."""
    variant = model.model.variant
    if variant in (None, schedule.variant):
        return None
    return (
        f"Wrong schedule: the model is Helios-{variant.title()}, the schedule is Helios-{schedule.variant.title()}'s. "
        "Connect the schedule of the model's variant, or the loader's own."
    )


def frames_asked(latent: dict[str, Any], chunks: int) -> int:
    """Pixel frames that a LATENT of so many chunks asks for."""
    asked = video_state(latent)
    return asked.frames if asked else chunks * CHUNK_FRAMES


def sampled(samples: Tensor, frames: int, guider: HeliosGuider) -> dict[str, Any]:
    """The LATENT after a run: its last chunks in VAE space, and what is needed to go on after them."""
    state = VideoState(
        frames=frames,
        next_chunk=guider.first_index + guider.chunks,
        memory=guider.memory,
        rng_state=guider.rng.get_state(),
    )
    return {"samples": samples, STATE_KEY: state}
