"""What Helios reads and puts on CONDITIONING sockets: checked embeddings, the start of a video, prompts in a row."""

from __future__ import annotations

from typing import Any

import node_helpers
import torch
from torch import Tensor

from ...helios_core.video import PromptTrack, VideoStart
from .latent import is_plain

START_KEY = "helios_history"
TRACK_KEY = "helios_prompts"


def check_conditioning(conditioning: Any, socket: str) -> None:
    """Raise ValueError, with the socket's name, for what is no list of [embedding (B, L, D), values]."""
    if not isinstance(conditioning, list) or not all(map(_is_entry, conditioning)):
        raise ValueError(
            f"`{socket}` got no conditioning; expected a list of embeddings with their values. Connect a prompt, from "
            "Helios Text Encode or Helios Prompt Schedule."
        )
    if not conditioning:
        raise ValueError(f"The {socket} conditioning is empty. Connect a prompt through Helios Text Encode.")
    for embedding, _ in conditioning:
        if embedding.ndim != 3 or not embedding.numel() or not embedding.is_floating_point():
            raise ValueError(
                f"The {socket} conditioning has the shape {tuple(embedding.shape)} ({embedding.dtype}); expected "
                "(batch, tokens, width), as Helios Text Encode makes it."
            )
        if not embedding.float().isfinite().all():
            raise ValueError(
                f"The {socket} conditioning holds NaN or infinite values. Load the text encoder in another dtype, or "
                "download it again."
            )


def _is_entry(entry: Any) -> bool:
    match entry:
        case [embedding, dict()]:
            return is_plain(embedding)
    return False


def set_history(conditioning: list, start: VideoStart) -> list:
    return node_helpers.conditioning_set_values(conditioning, {START_KEY: start})


def find_history(conditioning: list) -> VideoStart:
    """The start a conditioning carries; without one, a video begins from nothing."""
    return next((values[START_KEY] for _, values in conditioning if START_KEY in values), VideoStart())


def set_track(positive: list, track: PromptTrack) -> list:
    return node_helpers.conditioning_set_values(positive, {TRACK_KEY: track})


def find_track(positive: list) -> PromptTrack | None:
    """The prompts in a row that a conditioning carries; None for an ordinary one."""
    return next((values[TRACK_KEY] for _, values in positive if TRACK_KEY in values), None)


def is_changed(track: PromptTrack, embedding: Tensor) -> bool:
    """Whether a node has changed the embedding that these prompts lie beside, and handed them on."""
    first = track.embeddings[0]
    return first.shape != embedding.shape or not torch.equal(first.to(embedding), embedding)


def without_changed_tracks(conditioning: list) -> list:
    """With what nodes have made of embeddings, as ConditioningZeroOut does, for the whole video."""
    return [
        [embedding, {k: x for k, x in values.items() if k != TRACK_KEY or not is_changed(x, embedding)}]
        for embedding, values in conditioning
    ]
