"""What travels between the steps of a graph: how a video begins, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .history import HistoryLayout, Memory


@dataclass(frozen=True)
class HistorySeed:
    """What a video begins from. Without a memory: from nothing, text-to-video."""

    layout: HistoryLayout = field(default_factory=HistoryLayout)
    memory: Memory | None = None
    skip_first_chunk: bool = False

    def start(self, batch: int, height: int, width: int) -> Memory:
        """The memory before the first chunk of a video of this size (in latents). ValueError if it does not fit."""
        if self.memory is None:
            return Memory.empty(batch, height, width, self.layout)
        b, _, _, h, w = self.memory.latents.shape
        if (h, w) != (height, width) or b not in (1, batch):
            raise ValueError(
                f"The history is {w * 8}x{h * 8} in a batch of {b}, but the video is {width * 8}x{height * 8} in a "
                f"batch of {batch}. Give both the same size."
            )
        return self.memory.expand(batch)


@dataclass(frozen=True)
class VideoState:
    """Where a video stands: with its latents, all that is needed to go on."""

    frames: int  # pixel frames asked for, before rounding up to whole chunks
    next_chunk: int = 0
    memory: Memory | None = None  # None until something was sampled
    rng_state: Tensor | None = None
