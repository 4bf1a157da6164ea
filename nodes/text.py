"""Prompts in, CONDITIONING out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.compat import schema
from ..host.messages import Notes
from ..host.model.offload_patcher import offloaded_clip, offloading
from ..host.sockets.text_encoding import encode_prompt
from .inputs import NEGATIVE, POSITIVE, offload_inputs


class HeliosTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosTextEncode",
            display_name="Helios Text Encode",
            category="Helios",
            description=(
                "Turns two prompts into the conditioning Helios was trained with: cleaned up, 512 tokens, and nothing "
                "read as syntax. Parentheses, weights and embedding names are plain text."
            ),
            search_aliases=["helios prompt", "umt5", "clip text encode"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="UMT5-XXL, from Helios Diffusers Loader or from a CLIPLoader of type 'wan'.",
                ),
                io.String.Input(
                    "positive",
                    multiline=True,
                    default=POSITIVE,
                    tooltip="What the video shows. Works best with 20 to 40 words or more, and with words for the "
                    "camera. At most 512 tokens are read.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default=NEGATIVE,
                    tooltip="What to stay away from. Helios-Base and Helios-Mid use it; Helios-Distilled runs without "
                    "guidance and ignores it. May be empty.",
                ),
                *offload_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, clip: Any, positive: str, negative: str, group_offload: str = "off", blocks_per_group: int = 1
    ) -> io.NodeOutput:
        notes = Notes(cls.hidden.unique_id)
        with offloaded_clip(clip, offloading(group_offload, blocks_per_group, "disk")) as encoder:
            return io.NodeOutput(
                encode_prompt(encoder, positive, "The positive prompt", notes.warn),
                encode_prompt(encoder, negative, "The negative prompt", notes.warn),
            )


NODES = [HeliosTextEncode]
