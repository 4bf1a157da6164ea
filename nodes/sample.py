"""Denoise a video, chunk by chunk."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES
from ..helios_core.video import HistorySeed, VideoState
from .host.compat import schema
from .host.conditioning import find_history
from .host.guider import HeliosGuider, check_sampling
from .host.latent import STATE_KEY, video_state
from .host.progress import clear_warning, warn
from .schedule import HeliosScheduleSocket


class HeliosChunkedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosChunkedSampler",
            display_name="Helios Chunked Sampler",
            category="Helios",
            description="Denoises a video of any length, 33 frames at a time, each chunk seeing the ones before it.",
            search_aliases=["helios", "ksampler", "long video", "video sampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Helios Model Loader or Helios Diffusers Loader."),
                io.Conditioning.Input("positive", tooltip="From Helios History Injection."),
                io.Conditioning.Input("negative", tooltip="Not used by the Distilled schedule, which has no guidance."),
                io.Latent.Input("latent", tooltip="Size and length of the video, from Helios History Injection."),
                HeliosScheduleSocket.Input("schedule", tooltip="The schedule of the model's variant."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="All noise is drawn from it, on the CPU: the same seed gives the same video.",
                ),
                io.Combo.Input(
                    "seed_mode",
                    options=["continue", "new"],
                    default="continue",
                    optional=True,
                    tooltip=(
                        "For a video that goes on from `previous`. continue: draw on where it stopped, as if both had "
                        "been made in one run; the seed is not used. new: start from the seed."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip=(
                        "For Helios Chunked VAE Decode. The ordinary VAE Decode takes all for one clip: 69 frames "
                        "for 66, and wrong at the seams."
                    ),
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, schedule, seed, seed_mode="continue") -> io.NodeOutput:
        samples = latent["samples"]
        chunks = check_sampling(model, positive, negative, samples, schedule)
        history_seed = find_history(positive)
        rng = make_rng(history_seed, seed, seed_mode)
        batch, _, _, height, width = samples.shape
        memory = history_seed.start(batch, height, width, rng)
        clear_warning(cls.hidden.unique_id)
        variant = model.model.variant
        if variant not in (None, schedule.variant):
            warn(
                f"Wrong schedule: the model is Helios-{variant.title()}, the schedule is Helios-"
                f"{schedule.variant.title()}'s. Connect the schedule of the model's variant, or the loader's own.",
                cls.hidden.unique_id,
            )

        guider = HeliosGuider(
            model,
            schedule,
            memory,
            chunks,
            rng,
            first_index=history_seed.first_index,
            skip_first_chunk=history_seed.skip_first_chunk,
        )
        guider.set_conds(positive, negative)
        video = guider.generate()
        asked = video_state(latent)
        state = VideoState(
            frames=asked.frames if asked else chunks * CHUNK_FRAMES,
            next_chunk=history_seed.first_index + chunks,
            memory=guider.memory,
            rng_state=rng.get_state(),
        )
        return io.NodeOutput({"samples": video, STATE_KEY: state})


def make_rng(history_seed: HistorySeed, seed: int, seed_mode: str) -> torch.Generator:
    """The generator of a run, on the CPU: the one of the video that goes on, or a new one."""
    if seed_mode not in ("continue", "new"):
        raise ValueError(f"seed_mode must be continue or new, got {seed_mode!r}.")
    rng = torch.Generator().manual_seed(seed)
    if seed_mode == "continue" and history_seed.rng_state is not None:
        rng.set_state(history_seed.rng_state)
    return rng


NODES = [HeliosChunkedSampler]
