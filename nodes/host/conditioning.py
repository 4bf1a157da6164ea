"""The history seed on CONDITIONING sockets."""

from __future__ import annotations

import node_helpers

from ...helios_core.video import HistorySeed

SEED_KEY = "helios_history"


def set_history(conditioning: list, seed: HistorySeed) -> list:
    return node_helpers.conditioning_set_values(conditioning, {SEED_KEY: seed})


def find_history(conditioning: list) -> HistorySeed:
    """The seed a conditioning carries; without one, a video begins from nothing."""
    return next((values[SEED_KEY] for _, values in conditioning if SEED_KEY in values), HistorySeed())
