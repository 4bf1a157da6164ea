"""Denoise a video, chunk by chunk."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS
from ..helios_core.video import VideoState
from .host.compat import schema
from .host.conditioning import find_history
from .host.guider import HeliosGuider, check_sampling
from .host.latent import STATE_KEY, video_state
from .host.progress import warn
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
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Decode it with Helios Chunked VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, schedule, seed) -> io.NodeOutput:
        samples = latent["samples"]
        check_sampling(model, positive, negative, samples, schedule)
        history_seed = find_history(positive)
        memory = history_seed.start(samples.shape[0], *samples.shape[-2:])
        variant = model.model.variant
        if variant not in (None, schedule.variant):
            warn(
                f"The model is Helios-{variant.title()}, but the schedule is for Helios-{schedule.variant.title()}: "
                "the video will look wrong. Connect the schedule of the model's variant.",
                cls.hidden.unique_id,
            )

        chunks = samples.shape[2] // CHUNK_LATENTS
        rng = torch.Generator().manual_seed(seed)
        guider = HeliosGuider(model, schedule, memory, chunks, rng, skip_first_chunk=history_seed.skip_first_chunk)
        guider.set_conds(positive, negative)
        video = guider.generate()
        asked = video_state(latent)
        state = VideoState(
            frames=asked.frames if asked else chunks * CHUNK_FRAMES,
            next_chunk=chunks,
            memory=guider.memory,
            rng_state=rng.get_state(),
        )
        return io.NodeOutput({"samples": video, STATE_KEY: state})


NODES = [HeliosChunkedSampler]
