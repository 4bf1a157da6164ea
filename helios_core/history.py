"""Unified history injection: what earlier chunks leave behind, and how a chunk gets to see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CHUNK_LATENTS, HISTORY_SIZES, LATENT_CHANNELS


@dataclass(frozen=True)
class FrameIndices:
    """Positions in time of a chunk and of its history, relative to the window: the same for every chunk."""

    long: tuple[int, ...]
    mid: tuple[int, ...]
    short: tuple[int, ...]
    noisy: tuple[int, ...]


@dataclass(frozen=True)
class HistoryLayout:
    """How many latent frames each term of the memory holds, oldest first, and whether a first-frame anchor leads it."""

    sizes: tuple[int, int, int] = HISTORY_SIZES
    keep_first_frame: bool = True

    def __post_init__(self) -> None:
        if len(self.sizes) != 3 or min(self.sizes) < 1:
            raise ValueError(f"History sizes must be three numbers from 1 (long, mid, short), got {self.sizes}.")

    @property
    def split(self) -> tuple[int, int, int]:
        """Latent frames taken from the past for long, mid and short; without the anchor, short takes its place."""
        long, mid, short = self.sizes
        return long, mid, short if self.keep_first_frame else short + 1

    @property
    def frames(self) -> int:
        return sum(self.split)

    @property
    def indices(self) -> FrameIndices:
        """Positions in time: the anchor is 0 and heads short; long, mid, the rest of short and noisy follow it."""
        anchor = (0,) if self.keep_first_frame else ()
        long, mid, short = self.split
        mid_start = len(anchor) + long
        short_start = mid_start + mid
        noisy_start = short_start + short
        return FrameIndices(
            long=tuple(range(len(anchor), mid_start)),
            mid=tuple(range(mid_start, short_start)),
            short=(*anchor, *range(short_start, noisy_start)),
            noisy=tuple(range(noisy_start, noisy_start + CHUNK_LATENTS)),
        )


@dataclass(frozen=True)
class History:
    """What the network is shown beside a chunk; full latent resolution in every pyramid stage."""

    long: Tensor  # (B, 16, 16, H, W)
    mid: Tensor  # (B, 16, 2, H, W)
    short: Tensor  # (B, 16, 2, H, W): anchor and last frame
    indices: FrameIndices

    def to(self, dtype: torch.dtype) -> History:
        """The same history in another dtype: the network's."""
        return replace(self, long=self.long.to(dtype), mid=self.mid.to(dtype), short=self.short.to(dtype))


def keep_last(latents: Tensor, frames: int) -> Tensor:
    """The last latent frames of (B, 16, T, H, W), with zeros before them if there are not as many."""
    missing = max(0, frames - latents.shape[2])
    return F.pad(latents[:, :, max(0, latents.shape[2] - frames) :], (0, 0, 0, 0, missing, 0))


@dataclass(frozen=True)
class Statistics:
    """Running averages of a video's chunks, per item and channel."""

    mean: Tensor  # (B, 16)
    var: Tensor  # (B, 16)


@dataclass(frozen=True)
class Memory:
    """Clean latents of the past, in normalised latent space; its size does not depend on the video's length."""

    latents: Tensor  # (B, 16, layout.frames, H, W), oldest first, zeros where there is no past
    anchor: Tensor | None = None  # (B, 16, 1, H, W); None until the first chunk has set it
    layout: HistoryLayout = field(default_factory=HistoryLayout)
    statistics: Statistics | None = None  # kept by anti-drifting
    drifted: bool = False  # the newest chunk is to be corrected before the next is made

    @classmethod
    def empty(cls, batch: int, height: int, width: int, layout: HistoryLayout | None = None) -> Memory:
        """No past at all: text-to-video. height and width are in latents."""
        layout = layout or HistoryLayout()
        return cls(torch.zeros(batch, LATENT_CHANNELS, layout.frames, height, width), None, layout)

    def to(self, device: torch.device | str) -> Memory:
        """The same memory on another device, in float32."""
        return self._map(lambda x: x.to(device, torch.float32))

    def expand(self, batch: int) -> Memory:
        """The same past for every item of a batch of this size."""
        return self._map(lambda x: x.expand(batch, *x.shape[1:]))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        s = self.statistics
        return replace(
            self,
            latents=function(self.latents),
            anchor=None if self.anchor is None else function(self.anchor),
            statistics=None if s is None else Statistics(function(s.mean), function(s.var)),
        )

    def with_layout(self, layout: HistoryLayout) -> Memory:
        """As much of this past as another layout holds; zeros where it would reach further back."""
        return replace(self, latents=keep_last(self.latents, layout.frames), layout=layout)

    def history(self) -> History:
        """What the network is shown of this memory while it makes the next chunk."""
        long, mid, short = self.latents.split(self.layout.split, dim=2)
        if self.layout.keep_first_frame:
            anchor = torch.zeros_like(short[:, :, :1]) if self.anchor is None else self.anchor
            short = torch.cat([anchor, short], dim=2)
        return History(long, mid, short, self.layout.indices)

    def push(self, latents: Tensor, reanchor: bool = False) -> Memory:
        """Remember a finished chunk (B, 16, 9, H, W) and forget what falls out of the window.

        The first chunk of a video that has no anchor yet provides it, shown or not: a later run may have another
        layout. `reanchor` replaces the one there is.
        """
        past = torch.cat([self.latents, latents.to(self.latents.dtype)], dim=2)[:, :, -self.layout.frames :]
        anchor = self.anchor
        if anchor is None or reanchor:
            anchor = latents[:, :, :1].to(self.latents.dtype)
        return replace(self, latents=past.contiguous(), anchor=anchor)
