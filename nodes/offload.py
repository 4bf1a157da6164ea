"""The widgets of group offloading, on every node that runs a model of its own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.compat import advanced
from ..host.model.offload_patcher import GROUP_OFFLOAD

TOOLTIP = (
    "For cards that the model does not fit. off: ComfyUI's own memory management. block: a few blocks are on the card "
    "at a time, the next ones are copied while these compute. leaf: layer by layer, the least memory."
)

DECODE_TOOLTIP = (
    "For cards that decoding does not fit. off: ComfyUI's own memory management. block, leaf: the decoder's weights "
    "travel in pieces, it computes in bf16 where the card can, and decodes in tiles of 256 pixels."
)


def offload_inputs(tooltip: str = TOOLTIP) -> list[Any]:
    return [
        io.Combo.Input("group_offload", options=list(GROUP_OFFLOAD), default="off", optional=True, tooltip=tooltip),
        advanced(
            io.Int.Input,
            "blocks_per_group",
            default=1,
            min=1,
            max=40,
            optional=True,
            tooltip="For group_offload block: how many blocks travel together. More need more memory.",
        ),
    ]
