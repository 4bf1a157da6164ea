"""How a video begins: its size and length, and the history that its first chunk sees."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..helios_core.config import (
    CHUNK_LATENTS,
    LATENT_CHANNELS,
    NATIVE_HEIGHT,
    NATIVE_WIDTH,
    SPATIAL_SCALE,
    num_chunks,
)
from ..helios_core.video import HistorySeed, VideoState
from .host.compat import schema
from .host.conditioning import set_history
from .host.latent import STATE_KEY


class HeliosHistoryInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosHistoryInjection",
            display_name="Helios History Injection",
            category="Helios",
            description="Sets the size and length of a video and the history it begins from: none, for text-to-video.",
            search_aliases=["helios", "text to video", "empty latent video"],
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Int.Input(
                    "width",
                    default=NATIVE_WIDTH,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="The models were trained at 640x384 only; other sizes run, and look worse.",
                ),
                io.Int.Input("height", default=NATIVE_HEIGHT, min=64, max=2048, step=64, tooltip="See width."),
                io.Int.Input(
                    "frames",
                    default=264,
                    min=1,
                    max=99_999,
                    tooltip="At 24 frames a second; rounded up to whole chunks of 33. Trained up to 1452 (a minute).",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, width, height, frames, batch_size) -> io.NodeOutput:
        size = (height // SPATIAL_SCALE, width // SPATIAL_SCALE)
        samples = torch.zeros((batch_size, LATENT_CHANNELS, num_chunks(frames) * CHUNK_LATENTS, *size))
        seed = HistorySeed()
        return io.NodeOutput(
            set_history(positive, seed),
            set_history(negative, seed),
            {"samples": samples, STATE_KEY: VideoState(frames)},
        )


NODES = [HeliosHistoryInjection]
