"""Clips of the world as normalised latents, encoded once and kept: what the transformer is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from trainer import log, save_atomically
from wan import encode
from world import FRAMES_PER_CHUNK, render, sample_clip

CHUNKS = 6
BLOCK = 25  # clips a file
AT_ONCE = 5  # clips a call of the VAE
HARD = 3  # times as often are clips drawn whose motion is learnt last: which way a thing circles
STILL_FRAMES = 17  # of an image held still: by then its latent has stopped changing


@dataclass
class Shelf:
    """Encoded clips on a device; clip i is `sample_clip(first + i)`."""

    vae: AutoencoderKLWan
    folder: Path
    size: int
    first: int = 0

    def __post_init__(self) -> None:
        self.device = str(self.vae.device)
        self.frames = torch.empty(0)  # (N, 54, 16, h, w), float16: chunk after chunk
        self.stills = torch.empty(0)  # (N, 16, h, w): last latent of the clip's first frame held still
        self.captions: list[list[str]] = []  # of each clip's chunks
        self.pool = np.empty(0, int)  # numbers of clips, as often as each is to be drawn
        while self._path().exists():
            self._add(torch.load(self._path(), weights_only=True))
        log.info("%d encoded clips of side %d", len(self.frames), self.size)

    def _path(self) -> Path:
        return self.folder / f"latents-{self.size}" / f"{self.first + len(self.frames):06d}.pt"

    def _add(self, block: dict[str, Tensor]) -> None:
        for name in ("frames", "stills"):
            old, new = getattr(self, name), block[name].to(self.device)
            setattr(self, name, torch.cat([old, new]) if len(old) else new)
        for number in range(len(self.captions), len(self.frames)):
            acts = sample_clip(self.first + number, CHUNKS).acts
            self.captions.append([act.caption for act in acts])
            self.pool = np.append(self.pool, [number] * (HARD if acts[0].motion.startswith("orbit") else 1))

    @torch.no_grad()
    def grow(self, total: int) -> None:
        """Encode clips until there are so many."""
        while (count := len(self.frames)) < total:
            frames, stills = [], []
            for number in range(count, count + BLOCK, AT_ONCE):
                clips = [sample_clip(self.first + number + k, CHUNKS) for k in range(AT_ONCE)]
                videos = torch.stack([render(clip, size=self.size, device=self.device) for clip in clips])
                chunks = videos.unflatten(1, (CHUNKS, FRAMES_PER_CHUNK)).flatten(0, 1)
                frames.append(normalised(self.vae, chunks).unflatten(0, (AT_ONCE, CHUNKS)).flatten(1, 2))
                stills.append(normalised(self.vae, videos[:, :1].expand(-1, STILL_FRAMES, -1, -1, -1))[:, -1])
            block = {"frames": torch.cat(frames), "stills": torch.cat(stills)}
            save_atomically(block, self._path())
            self._add(block)


@torch.no_grad()
def normalised(vae: AutoencoderKLWan, chunks: Tensor) -> Tensor:
    """Chunks (B, T, 3, H, W) in 0..1, T = 1 + 4n, each encoded alone: (B, 1 + n, 16, h, w) in float16."""
    with torch.autocast(chunks.device.type, torch.bfloat16):
        means = encode(vae, chunks * 2 - 1)[0]
    mean, std = (
        torch.tensor(v, device=chunks.device).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((means.float() - mean) / std).to(torch.float16)
