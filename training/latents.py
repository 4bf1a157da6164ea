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
from world import FRAMES_PER_CHUNK, Clip, render, sample_clip

CHUNKS = 6
BLOCK = 25  # clips a file
STILL_FRAMES = 17  # of an image held still: by then its latent has stopped changing


@dataclass
class Shelf:
    """Encoded clips; clip i is `sample_clip(first + i)`."""

    vae: AutoencoderKLWan
    folder: Path
    size: int
    first: int = 0

    def __post_init__(self) -> None:
        self.chunks = torch.empty(0)  # (N, 6, 9, 16, h, w), float16
        self.stills = torch.empty(0)  # (N, 16, h, w): last latent of the clip's first frame held still
        while self._path().exists():
            self._add(torch.load(self._path(), weights_only=True))
        log.info("%d encoded clips of side %d", len(self.chunks), self.size)

    def _path(self) -> Path:
        return self.folder / f"latents-{self.size}" / f"{self.first + len(self.chunks):06d}.pt"

    def _add(self, block: dict[str, Tensor]) -> None:
        self.chunks = torch.cat([self.chunks.to(torch.float16), block["chunks"]])
        self.stills = torch.cat([self.stills.to(torch.float16), block["stills"]])

    def clip(self, number: int) -> Clip:
        return sample_clip(self.first + number, CHUNKS)

    @torch.no_grad()
    def grow(self, device: str) -> None:
        """Encode another block of clips."""
        path, rows = self._path(), []
        for number in range(len(self.chunks), len(self.chunks) + BLOCK):
            video = render(self.clip(number), size=self.size)
            rows.append(
                (normalised(self.vae, video, device), normalised(self.vae, video[:1], device, STILL_FRAMES)[0, -1])
            )
        block = {"chunks": torch.stack([row[0] for row in rows]), "stills": torch.stack([row[1] for row in rows])}
        save_atomically(block, path)
        self._add(block)


def normalised(vae: AutoencoderKLWan, video: np.ndarray, device: str, held: int = 0) -> Tensor:
    """Chunks of a video (T, H, W, 3), each encoded alone, or its first frame `held` for so many:
    (chunks, latent frames, 16, h, w) in float16."""
    frames = torch.from_numpy(video).to(device).permute(0, 3, 1, 2) * 2 - 1
    chunks = frames[:1].expand(held, -1, -1, -1)[None] if held else frames.unflatten(0, (-1, FRAMES_PER_CHUNK))
    with torch.autocast(device, torch.bfloat16):
        means = torch.cat([encode(vae, chunk[None])[0] for chunk in chunks])
    mean, std = (
        torch.tensor(v, device=device).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((means.float() - mean) / std).to(torch.float16).cpu()
