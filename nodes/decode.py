"""Latents to frames."""

from __future__ import annotations

from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES, FRAME_RATE
from ..host.compat import schema
from ..host.messages import Notes
from ..host.model.offload_patcher import offloaded_vae, offloading
from ..host.sockets.decoding import decode_chunks, trim_warning, unsampled_warning
from ..host.sockets.vae import check_vae
from .inputs import DECODE_TOOLTIP, frame_inputs, offload_inputs


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
                *frame_inputs(),
                io.Int.Input(
                    "crossfade",
                    default=0,
                    min=0,
                    max=CHUNK_FRAMES - 1,
                    optional=True,
                    tooltip="Fade over the seams: this many frames of a chunk come out of the last frame before it.",
                ),
                *offload_inputs(DECODE_TOOLTIP),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="24 a second: connect `fps` to Create Video too."),
                io.Float.Output(
                    display_name="fps",
                    tooltip="24 frames a second, the models' own rate. Connect it to Create Video, which is set to 30.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, latent, vae, trim, drop_first=0, crossfade=0, group_offload="off", blocks_per_group=1
    ) -> io.NodeOutput:
        check_vae(vae)
        notes = Notes(cls.hidden.unique_id)
        with offloaded_vae(vae, offloading(group_offload, blocks_per_group, "disk")) as decoder:
            images = decode_chunks(latent, decoder, trim, drop_first, crossfade)
        notes.warn(trim_warning(latent, trim), unsampled_warning(latent))
        return io.NodeOutput(images, float(FRAME_RATE))


NODES = [HeliosChunkedVAEDecode]
