"""Denoise a video, chunk by chunk."""

from __future__ import annotations

from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES
from ..host.compat import schema
from ..host.messages import Notes
from ..host.sampling.inputs import latent_warning, prepare, sampled, source_warning, variant_warning
from ..host.sampling.whole_video import collect
from ..host.sockets.decoding import too_many_frames
from ..host.sockets.latent import asked_frames
from .inputs import model_inputs, seed_input, seed_mode_input


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
    def execute(cls, model, positive, negative, latent, schedule, seed, seed_mode="continue") -> io.NodeOutput:
        guider = prepare("Helios Chunked Sampler", model, positive, negative, latent, schedule, seed, seed_mode)
        notes = Notes(cls.hidden.unique_id)
        frames = asked_frames(latent) or guider.run.chunks * CHUNK_FRAMES
        batch, _, _, height, width = guider.run.chunk_shape
        too_many = too_many_frames(batch, frames, height, width)  # decoding says so too late
        notes.warn(variant_warning(model, schedule), latent_warning(latent), source_warning(positive, latent), too_many)
        return io.NodeOutput(sampled(collect(guider), frames, guider))


NODES = [HeliosChunkedSampler]
