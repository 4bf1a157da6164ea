"""What travels between the steps of a graph: how a video begins, what is asked of it, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import CHUNK_LATENTS, SPATIAL_SCALE
from .history import HistoryLayout, Memory, keep_last

SigmaRange = tuple[float, float]
NOISE_SIGMAS: SigmaRange = (0.111, 0.135)  # the reference's, for images and videos alike


@dataclass(frozen=True)
class EncodedPast:
    """Frames that a video goes on from, encoded: clean, normalised latents.

    Of a video they are its last whole chunks, encoded one by one; of an image, as if it had stood still for a chunk,
    the last latent of that chunk.
    """

    anchor: Tensor  # (B, 16, 1, H, W), the first frame
    latents: Tensor  # (B, 16, 9k or 1, H, W)
    skipped: int = 0  # whole chunks before these, which no history reaches and nobody encoded


@dataclass(frozen=True)
class VideoStart:
    """What a video begins from; without a source from nothing, text-to-video.

    Images and videos get noise, drawn where sampling starts: the network was trained on histories of its own making.
    """

    source: EncodedPast | Memory | None = None  # a Memory is that of a video made here, which goes on
    layout: HistoryLayout = field(default_factory=HistoryLayout)
    skip_first_chunk: bool = False
    add_noise: bool = True
    image_sigmas: SigmaRange = NOISE_SIGMAS
    video_sigmas: SigmaRange = NOISE_SIGMAS
    first_index: int = 0  # chunks the video has already; what is done to a first chunk is done once per video
    rng_state: Tensor | None = None  # of the generator that made them

    def __post_init__(self) -> None:
        for low, high in (self.image_sigmas, self.video_sigmas):
            if not 0 <= low <= high <= 1:
                raise ValueError(f"Noise sigmas must be 0 <= min <= max <= 1, got min {low} and max {high}.")

    def memory(self, batch: int, height: int, width: int, rng: torch.Generator) -> Memory:
        """The memory before the first chunk of a video of this size (in latents), float32 on the CPU.

        Draws from rng in the reference's order. Raises ValueError for a source of another size.
        """
        if self.source is None:
            return Memory.empty(batch, height, width, self.layout)
        b, _, _, h, w = self.source.latents.shape
        if (h, w) != (height, width) or b not in (1, batch):
            raise ValueError(
                f"The history is {w * SPATIAL_SCALE}x{h * SPATIAL_SCALE} in a batch of {b}, but the video is "
                f"{width * SPATIAL_SCALE}x{height * SPATIAL_SCALE} in a batch of {batch}. Give both the same size."
            )
        if isinstance(self.source, Memory):
            return self.source.with_layout(self.layout).expand(batch)
        anchor, past = (x.expand(batch, *x.shape[1:]) for x in (self.source.anchor, self.source.latents))
        if self.add_noise:
            anchor = _noised(anchor, self.image_sigmas, rng)
            for _ in range(self.source.skipped):  # the reference draws for all of the video
                _noised(torch.zeros_like(past[:, :, :CHUNK_LATENTS]), self.video_sigmas, rng)
            chunks = past.split(CHUNK_LATENTS, dim=2)
            past = torch.cat([_noised(chunk, self.video_sigmas, rng) for chunk in chunks], dim=2)
        return Memory(keep_last(past, self.layout.frames), anchor, self.layout)


def _noised(latents: Tensor, sigmas: SigmaRange, rng: torch.Generator) -> Tensor:
    """Mix noise into each frame of (B, 16, T, H, W) by a sigma of its own, uniform in the range."""
    low, high = sigmas
    sigma = torch.rand(latents.shape[2], generator=rng, device=rng.device) * (high - low) + low
    sigma = sigma.view(1, 1, -1, 1, 1).to(latents.device)
    noise = torch.randn(latents.shape, generator=rng, device=rng.device).to(latents.device)
    return sigma * noise + (1 - sigma) * latents


def check_lengths(chunks: tuple[int, ...], blend: int) -> None:
    """Raise ValueError for a prompt that does not last longer than the blend into it; lengths in chunks."""
    for number, length in enumerate(chunks, start=1):
        if length <= blend:
            raise ValueError(
                f"Prompt {number} lasts {length} chunks of 33 frames, and blending takes {blend}: every prompt must "
                "last longer than the blend. Lengthen the prompt or shorten the blend."
            )


@dataclass(frozen=True)
class Turn:
    """A prompt that takes over on the way, from whatever mixture is reached there."""

    chunk: int  # the first that it changes, counted from where the track begins
    embedding: Tensor  # (1, L, D)
    transition: int  # n chunks with the weights k/n, k = 1 to n; 0: at once, as 1

    def weight(self, chunks: int) -> float:
        """Its share in the last of its first `chunks` chunks."""
        return min(1.0, chunks / max(1, self.transition))


@dataclass(frozen=True)
class PromptTrack:
    """Several prompts in a row, each for a number of chunks, blending into the next; from the first turn on, turns."""

    embeddings: tuple[Tensor, ...]  # (1, L, D) each
    chunks: tuple[int, ...]
    blend: int  # chunks at the start of a prompt that mix it with the one before
    turns: tuple[Turn, ...] = ()  # in their order

    def __post_init__(self) -> None:
        check_lengths(self.chunks, self.blend)
        sizes = {tuple(x.shape[1:]) for x in (*self.embeddings, *(turn.embedding for turn in self.turns))}
        if len(sizes) > 1:
            raise ValueError(
                f"The prompts have embeddings of {' and '.join(map(str, sorted(sizes)))} tokens and width: they were "
                "encoded by different text encoders. Connect the same one wherever prompts of a video are encoded."
            )

    def at(self, index: int) -> Tensor:
        """The embedding (1, L, D) of a chunk, counted from where the track begins; the last prompt stays."""
        turns = [turn for turn in self.turns if turn.chunk <= index]
        if not turns:
            return self._scheduled(index)
        shown = self._scheduled(max(0, turns[0].chunk - 1))
        for turn, end in zip(turns, [*(turn.chunk for turn in turns[1:]), index + 1], strict=True):
            weight = turn.weight(end - turn.chunk)
            shown = turn.embedding if weight == 1 else torch.lerp(shown, turn.embedding, weight)
        return shown

    def turned(self, turn: Turn) -> PromptTrack:
        """The track from turn.chunk on, which is all that it still knows: of what was before, the mixture reached."""
        before = replace(self, turns=tuple(other for other in self.turns if other.chunk < turn.chunk))
        return PromptTrack((before.at(max(0, turn.chunk - 1)),), (1,), 0, (turn,))

    def _scheduled(self, index: int) -> Tensor:
        """The weights of a blend are linspace(0, 1, blend), as in the authors' repository: the first chunk of a new
        prompt is still all the old one.
        """
        start = 0
        for number, length in enumerate(self.chunks):
            if index < start + length or number == len(self.chunks) - 1:
                break
            start += length
        new, position = self.embeddings[number], index - start
        if number == 0 or position >= self.blend:
            return new
        weight = torch.linspace(0, 1, self.blend)[position].item()
        return torch.lerp(self.embeddings[number - 1], new, weight)


@dataclass(frozen=True)
class VideoState:
    """What a LATENT carries beside its samples, so that a next sampling can go on after them."""

    frames: int  # pixel frames asked for, before rounding up to whole chunks
    next_chunk: int = 0
    memory: Memory | None = None  # None until something was sampled
    rng_state: Tensor | None = None
    source: EncodedPast | Memory | None = None  # what the conditioning made beside it begins from
