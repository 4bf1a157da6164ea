"""More than one prompt: in a row in one video, or one for each video from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES, FRAME_RATE
from ..helios_core.video import PromptTrack, Turn, check_lengths
from ..host.compat import INCREMENT, advanced, schema
from ..host.files.prompt_file import fingerprint, read_prompts, text_files
from ..host.messages import Notes, tell
from ..host.model.offload_patcher import offloaded_clip, offloading
from ..host.sockets.conditioning import check_conditioning, find_track, set_track
from ..host.sockets.prompt_changes import SteeredPrompts
from ..host.sockets.text_encoding import encode_prompt
from ..host.widget_checks import found
from .inputs import NEGATIVE, POSITIVE, offload_inputs

SLOTS = (1, 2, 3, 4)
UNITS = ("chunks", "seconds")
PROMPTS = (
    POSITIVE,
    "The red fox runs out of the snowy birch forest onto a frozen lake and slows to a careful walk. The low golden sun "
    "throws its long shadow over the clear ice. The camera follows at eye level in one smooth tracking shot, shallow "
    "depth of field, natural colors, fine detail in the fur.",
    "The red fox sits down on a dark rock at the shore of the frozen lake, curls its tail around its paws and looks "
    "across the ice into the rising sun. Light snow begins to fall. The camera moves slowly closer until its face "
    "fills the picture, shallow depth of field, natural colors, fine detail in the fur.",
    "",
)
LENGTHS = (7.0, 7.0, 7.0, 0.0)
NOT_STEERED = SteeredPrompts(None, 0, {})


class HeliosPromptSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosPromptSchedule",
            display_name="Helios Prompt Schedule",
            category="Helios",
            description=(
                "Several prompts in a row for one video, each for a number of chunks of 33 frames, blending into the "
                "next. Connect frames to Helios History Injection, so that the video is as long as the prompts."
            ),
            search_aliases=["helios prompt", "prompt travel", "interactive video", "story"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="UMT5-XXL, from Helios Diffusers Loader or from a CLIPLoader of type 'wan'."
                ),
                *(widget for number in SLOTS for widget in _slot(number)),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default="chunks",
                    tooltip="What the lengths count. A chunk is 33 frames, 1.375 seconds; lengths are rounded to whole "
                    "chunks, and the node shows what became of them.",
                ),
                io.Int.Input(
                    "blend",
                    default=3,
                    min=0,
                    max=999,
                    tooltip="Chunks at the start of each prompt but the first that mix it with the one before. Every "
                    "prompt must last longer. 0 or 1: no mixing, the new prompt begins at once or a chunk later.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default=NEGATIVE,
                    tooltip="What to stay away from, all video long. Helios-Distilled ignores it. May be empty.",
                ),
                io.Conditioning.Input(
                    "before",
                    optional=True,
                    tooltip="The positive of another Helios Prompt Schedule, whose prompts come first: for more than "
                    "four. The blend of this node holds for all of them.",
                ),
                *offload_inputs(),
                advanced(
                    io.String.Input,
                    "steered",
                    default="",
                    optional=True,
                    tooltip="The .json that Helios Stream Video keeps of a steered video (output/helios_prompts), "
                    "pasted here: its prompts take over at the same chunks. If it names the first prompt, those above "
                    "and `before` are not used.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Int.Output(display_name="frames", tooltip="Of all prompts, for Helios History Injection."),
                io.String.Output(display_name="summary", tooltip="The length of each prompt, rounded to whole chunks."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, clip, unit, blend, negative, before=None, group_offload="off", blocks_per_group=1, steered="", **slots
    ) -> io.NodeOutput:
        script = SteeredPrompts.from_json(steered) if steered.strip() else NOT_STEERED
        if script.begins_with is not None:
            before, blend, pairs = None, 0, [(script.begins_with, script.chunks)]
        else:
            pairs = [(text, _whole_chunks(length, unit)) for text, length in _used_slots(slots)]
        earlier = _track_before(before)
        texts, lengths = zip(*pairs, strict=True)
        chunks = (*earlier.chunks, *lengths)
        chunks = (*chunks[:-1], chunks[-1] + max(0, script.chunks - sum(chunks)))
        check_lengths(chunks, blend)  # before the text encoder is loaded
        names = [*(f"Prompt {number}" for number in range(1, len(texts) + 1)), "The negative prompt"]
        notes = Notes(cls.hidden.unique_id)
        if script.begins_with is not None:
            notes.inform("`steered` has the first prompt: those above, and `before`, are not used.")
        with offloaded_clip(clip, offloading(group_offload, blocks_per_group, "disk")) as encoder:
            *encoded, unwanted = [
                encode_prompt(encoder, text, name, notes.warn)
                for name, text in zip(names, (*texts, negative), strict=True)
            ]
            turns = tuple(
                Turn(after, encode_prompt(encoder, change.prompt, warn=notes.warn)[0][0], change.transition)
                for after, change in script.changes.items()
            )
        embeddings = earlier.embeddings + tuple(entries[0][0] for entries in encoded)
        # A text encoder whose LoRA has keyframes makes several embeddings of a prompt: its first is for all steps.
        positive = before or [[embeddings[0], values] for _, values in encoded[0]]
        turns = tuple(sorted((*earlier.turns, *turns), key=lambda turn: turn.chunk))
        summary = _summary(chunks, turns)
        notes.inform(summary)
        return io.NodeOutput(
            set_track(positive, PromptTrack(embeddings, chunks, blend, turns)),
            unwanted,
            sum(chunks) * CHUNK_FRAMES,
            summary,
        )


def _slot(number: int) -> tuple[io.String.Input, io.Float.Input]:
    return (
        io.String.Input(
            f"prompt_{number}",
            multiline=True,
            default=PROMPTS[number - 1],
            tooltip="Describe the whole picture again, not only what changes. At most 512 tokens are read.",
        ),
        io.Float.Input(
            f"length_{number}",
            default=LENGTHS[number - 1],
            min=0.0,
            max=9999.0,
            step=0.1,
            tooltip="How long this prompt lasts, in the unit below. 0, and an empty text: not used.",
        ),
    )


def _used_slots(slots: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(text, length) of each prompt in use. Raises ValueError for one without the other, for gaps, and for none."""
    pairs = [(slots[f"prompt_{number}"], slots[f"length_{number}"]) for number in SLOTS]
    while pairs and not pairs[-1][0].strip() and not pairs[-1][1]:
        pairs.pop()
    if not pairs:
        raise ValueError("There is no prompt. Give prompt 1 a text and a length.")
    for number, (text, length) in enumerate(pairs, start=1):
        if not text.strip():
            why = f"lasts {length:g}" if length else "a later one is used"
            raise ValueError(
                f"Prompt {number} of this node is empty, but {why}. Give it a text; only the last prompts may be left "
                "out, with an empty text and length 0."
            )
        if length <= 0:
            raise ValueError(
                f"Prompt {number} of this node has a text, but its length is {length:g}. Give it a length, or empty "
                "the text to leave it out."
            )
    return pairs


def _track_before(before: list | None) -> PromptTrack:
    if before is None:
        return PromptTrack((), (), 0)
    check_conditioning(before, "before")
    track = find_track(before)
    if track is None:
        raise ValueError(
            "The conditioning at 'before' carries no prompts with lengths. Connect the positive output of another "
            "Helios Prompt Schedule."
        )
    return track


def _whole_chunks(length: float, unit: str) -> int:
    chunks = length * FRAME_RATE / CHUNK_FRAMES if unit == "seconds" else length
    return max(1, math.floor(chunks + 0.5))


def _summary(chunks: tuple[int, ...], turns: tuple[Turn, ...]) -> str:
    """Such as "1: 5 chunks (6.9 s) | 2: 1 chunk (1.4 s) | total: 6 chunks (8.2 s) | steered after chunk 3, 4"."""

    def length(count: int) -> str:
        return f"{count} chunk{'s' * (count != 1)} ({count * CHUNK_FRAMES / FRAME_RATE:.1f} s)"

    prompts = [f"{number}: {length(count)}" for number, count in enumerate(chunks, start=1)]
    steered = [f"steered after chunk {', '.join(str(turn.chunk) for turn in turns)}"] if turns else []
    return " | ".join([*prompts, f"total: {length(sum(chunks))}", *steered])


class HeliosPromptFromFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosPromptFromFile",
            display_name="Helios Prompt From File",
            category="Helios",
            description=(
                "One prompt of a text file in ComfyUI's input folder, one per line. Queue the graph as often as the "
                "file has prompts, and each run takes the next. Blank lines and lines that start with # are skipped."
            ),
            search_aliases=["helios prompt", "batch prompts", "prompt list", "load prompts"],
            inputs=[
                io.Combo.Input("file", options=text_files(), tooltip="A .txt file in the input folder, in UTF-8."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=INCREMENT,
                    tooltip="Which prompt: 0 is the first, and after the last comes the first again. With 'increment' "
                    "below, each queued run takes the next.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt"),
                io.Int.Output(display_name="count", tooltip="How many prompts the file holds."),
                io.Int.Output(display_name="index", tooltip="The index used: below count."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def validate_inputs(cls, file) -> bool | str:
        return await found(read_prompts, file)

    @classmethod
    def fingerprint_inputs(cls, file, index) -> tuple[int, int] | float:
        return math.nan if file is None else fingerprint(file)  # linked, not known yet: it runs every time

    @classmethod
    def execute(cls, file, index) -> io.NodeOutput:
        prompts = read_prompts(file)
        index %= len(prompts)
        tell(f"{index + 1} of {len(prompts)}: {prompts[index]}", cls.hidden.unique_id)
        return io.NodeOutput(prompts[index], len(prompts), index)


NODES = [HeliosPromptSchedule, HeliosPromptFromFile]
