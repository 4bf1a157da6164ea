"""Videos of Helios-Tiny by the pack's nodes. Import it once ComfyUI and training/ are on sys.path (harness/pack.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from world import FRAMES_PER_CHUNK, SCENES, Clip, sample_clip

from comfyui_helios.helios_core.config import CHUNK_LATENTS
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.load import HeliosDiffusersLoader
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from comfyui_helios.nodes.text import HeliosTextEncode
from harness.nodes import run_node

SIZE = 128  # what Helios-Tiny was trained at
QUICK = {"base": (18,), "mid": (8, 8, 8), "distilled": (2, 2, 2)}  # steps by the variant
MEASURING = 800_000_000  # seeds of clips from here on are for measuring: training has seen none of them


@dataclass(frozen=True)
class Tiny:
    """A variant of Helios-Tiny as Helios Diffusers Loader gives it, in float32."""

    model: Any
    clip: Any
    vae: Any
    schedule: Any

    def in_steps(self, *steps: int) -> Tiny:
        """The same with another number of steps a stage."""
        return replace(self, schedule=replace(self.schedule, steps=steps))


@cache
def load(variant: str) -> Tiny:
    return Tiny(*run_node(HeliosDiffusersLoader, f"Helios-Tiny-{variant.title()}", "fp32"))


def ask(tiny: Tiny, caption: str) -> tuple[Any, Any]:
    """(positive, negative), from Helios Text Encode."""
    positive, negative = run_node(HeliosTextEncode, tiny.clip, caption, "")
    return positive, negative


def sample(tiny: Tiny, prompts: tuple[Any, Any], chunks: int, seed: int, **start: Any) -> dict[str, Any]:
    """The LATENT of a video of so many chunks; `start` is what Helios History Injection takes beside the prompts."""
    inputs = run_node(
        HeliosHistoryInjection,
        *prompts,
        width=SIZE,
        height=SIZE,
        frames=chunks * FRAMES_PER_CHUNK,
        batch_size=1,
        vae=tiny.vae,
        **start,
    )
    [latent] = run_node(HeliosChunkedSampler, tiny.model, *inputs, tiny.schedule, seed)
    return dict(latent)


def decode(tiny: Tiny, latent: dict[str, Any], chunks: Sequence[int] | None = None) -> np.ndarray:
    """Frames (T, H, W, 3) in 0..1 of a LATENT, or of some chunks of it in a row."""
    samples = latent["samples"]
    if chunks is not None:
        samples = samples.unflatten(2, (-1, CHUNK_LATENTS))[:, :, list(chunks)].flatten(2, 3)
    images, _ = run_node(HeliosChunkedVAEDecode, {"samples": samples}, tiny.vae, trim=False)
    return np.asarray(images)


def clips(count: int, held_out: bool) -> list[Clip]:
    """The first clips for measuring, steady for as many chunks as `detect.find` needs of them."""
    drawn = (sample_clip(MEASURING + number, 1, held_out) for number in range(count))
    return [replace(clip, acts=clip.acts * needed_chunks(clip)) for clip in drawn]


def needed_chunks(clip: Clip) -> int:
    """What passes behind the wall shows whole in any two chunks, but not in any one."""
    return 2 if SCENES[clip.acts[0].motion] == "wall" else 1


def seam_ratios(frames: np.ndarray) -> np.ndarray:
    """How much frames differ at each seam of (33k, H, W, 3), as a multiple of what they do around it, (k - 1,)."""
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    is_seam = np.arange(1, len(frames)) % FRAMES_PER_CHUNK == 0
    return steps[is_seam] / steps[~is_seam].mean()
