"""Sockets and widgets that several nodes have, and the prompts that a new graph begins with."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.compat import advanced
from ..host.model.offload_patcher import GROUP_OFFLOAD

HeliosScheduleSocket = io.Custom("HELIOS_SCHEDULE")

POSITIVE = (
    "A red fox trots through a snowy birch forest at sunrise, its breath visible in the cold air. Golden light falls "
    "between the trunks and glitters on the fresh snow. The fox stops, pricks up its ears and runs on. The camera "
    "follows at eye level in one smooth tracking shot, shallow depth of field, natural colors, fine detail in the fur."
)
NEGATIVE = (
    "still image, frozen motion, blurry, overexposed, washed-out colors, grey picture, compression artifacts, "
    "subtitles, watermark, distorted hands, deformed face, extra limbs, cluttered background, walking backwards"
)

OFFLOAD_TOOLTIP = (
    "For cards that the model does not fit. off: ComfyUI's own memory management. block: a few blocks are on the card "
    "at a time, the next ones are copied while these compute. leaf: layer by layer, the least memory."
)

DECODE_TOOLTIP = (
    "For cards that decoding does not fit. off: ComfyUI's own memory management. block, leaf: the decoder's weights "
    "travel in pieces, it computes in bf16 where the card can, and decodes in tiles of 256 pixels."
)


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
    return advanced(
        io.Combo.Input,
        "seed_mode",
        options=["continue", "new"],
        default="continue",
        optional=True,
        tooltip=(
            "For a video that goes on from `previous`. continue: draw on where it stopped, as if both had "
            "been made in one run; the seed is not used. new: start from the seed."
        ),
    )


def frame_inputs() -> list[Any]:
    """Which of the decoded frames are kept."""
    return [
        io.Boolean.Input(
            "trim",
            default=False,
            tooltip="Cut the video to exactly the number of frames asked for, instead of whole chunks of 33.",
        ),
        io.Int.Input(
            "drop_first",
            default=0,
            min=0,
            max=99_999,
            optional=True,
            tooltip="Leave out this many frames at the beginning: the first ones are the weakest.",
        ),
    ]


def offload_inputs(tooltip: str = OFFLOAD_TOOLTIP) -> list[Any]:
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
