"""A run with saved chunks, made without a model."""

from __future__ import annotations

import torch

from comfyui_helios.host.stream.saved_chunks import HistoryLayout, Kind, Memory, SavedChunk, Statistics, open_run
from support.streams import cleaned_up

KEY = "a" * 64
SHAPE = (1, 16, 9, 4, 6)
LAYOUT = HistoryLayout((4, 2, 3))
KIND = Kind(SHAPE, LAYOUT, watched=True)


def make_chunk() -> SavedChunk:
    memory = Memory(
        torch.rand(1, 16, LAYOUT.frames, 4, 6),
        torch.rand(1, 16, 1, 4, 6),
        LAYOUT,
        Statistics(torch.rand(1, 16), torch.rand(1, 16)),
        drifted=True,
    )
    return SavedChunk(torch.rand(SHAPE), memory, torch.Generator().manual_seed(5).get_state())


def save_run(key: str = KEY, chunks: int = 2) -> None:
    with open_run(key, KIND, "note") as run:
        for index in range(chunks):
            run.save(index, make_chunk())
    cleaned_up()


def count() -> tuple[int, str | None]:
    with open_run(KEY, KIND, "note") as run:
        return run.count(5)
