"""Several prompts in a row on one CONDITIONING socket."""

from __future__ import annotations

import node_helpers

from ...helios_core.video import PromptTrack

TRACK_KEY = "helios_prompts"


def set_track(positive: list, track: PromptTrack) -> list:
    return node_helpers.conditioning_set_values(positive, {TRACK_KEY: track})


def find_track(positive: list) -> PromptTrack | None:
    """The prompts that a conditioning carries; None for an ordinary one."""
    return next((values[TRACK_KEY] for _, values in positive if TRACK_KEY in values), None)
