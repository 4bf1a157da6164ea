"""Latents to frames."""

from __future__ import annotations

from comfy_api.latest import io

from .host.compat import schema
from .host.decode import decode_chunks


class HeliosChunkedVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosChunkedVAEDecode",
            display_name="Helios Chunked VAE Decode",
            category="Helios",
            description=(
                "Decodes each chunk of 9 latents to 33 frames on its own, as the model was trained: the ordinary VAE "
                "Decode would take a chunk's first latent, an image, for four frames."
            ),
            search_aliases=["helios", "vae decode", "decode video"],
            inputs=[
                io.Latent.Input("latent", tooltip="From Helios Chunked Sampler."),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                io.Boolean.Input(
                    "trim",
                    default=False,
                    tooltip="Cut the video to exactly the number of frames asked for, instead of whole chunks of 33.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="All frames; connect Create Video.")],
        )

    @classmethod
    def execute(cls, latent, vae, trim) -> io.NodeOutput:
        return io.NodeOutput(decode_chunks(latent, vae, trim))


NODES = [HeliosChunkedVAEDecode]
