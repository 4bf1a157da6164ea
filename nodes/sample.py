"""Denoise a video, chunk by chunk."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.compat import schema
from ..host.messages import clear_warning, warn
from ..host.sampling.inputs import frames_asked, prepare, sampled, variant_warning
from ..host.sampling.whole_video import collect
from ..host.widget_checks import checked
from .schedule import HeliosScheduleSocket


def model_inputs() -> list[Any]:
    """What every sampling node takes first."""
    return [
        io.Model.Input("model", tooltip="From Helios Model Loader or Helios Diffusers Loader."),
        io.Conditioning.Input("positive", tooltip="From Helios History Injection."),
        io.Conditioning.Input("negative", tooltip="Not used by the Distilled schedule, which has no guidance."),
        io.Latent.Input("latent", tooltip="Size and length of the video, from Helios History Injection."),
        HeliosScheduleSocket.Input("schedule", tooltip="The schedule of the model's variant."),
    ]


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="All noise is drawn from it, on the CPU: the same seed gives the same video.",
    )


def seed_mode_input() -> io.Combo.Input:
    return io.Combo.Input(
        "seed_mode",
        options=["continue", "new"],
        default="continue",
        optional=True,
        tooltip=(
            "For a video that goes on from `previous`. continue: draw on where it stopped, as if both had "
            "been made in one run; the seed is not used. new: start from the seed."
        ),
    )


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
                *model_inputs(),
                seed_input(),
                seed_mode_input(),
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
    @checked
    def execute(cls, model, positive, negative, latent, schedule, seed, seed_mode="continue") -> io.NodeOutput:
        guider = prepare("Helios Chunked Sampler", model, positive, negative, latent, schedule, seed, seed_mode)
        clear_warning(cls.hidden.unique_id)
        if warning := variant_warning(model, schedule):
            warn(warning, cls.hidden.unique_id)
        video = collect(guider)
        return io.NodeOutput(sampled(video, frames_asked(latent, guider.run.chunks), guider))


NODES = [HeliosChunkedSampler]
