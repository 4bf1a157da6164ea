"""What a video of the procedural world shows, by plain image statistics: colour, shape, size, background and motion.

Colours are saturated and everything else is not, so the thing is found by its saturation. `python training/detect.py`
counts how often that is right on rendered clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES_PER_CHUNK,
    GROUND_PERIOD,
    GROUND_TOP,
    SIZES,
    Clip,
    render,
    sample_clip,
)

SEEN = 0.2, 0.6  # saturation from which a pixel counts, and from which it counts in full
STILL = 0.02  # what a centre may wander, in frame sides (standard deviation)
TRIANGLE, SQUARE = 0.4, 0.2  # three- and fourfold moments from which a thing is one: such have 0.8 and 0.6, balls 0


@dataclass(frozen=True)
class Finding:
    """None where there is nothing to be seen."""

    colour: str | None
    shape: str | None
    size: str | None
    background: str
    motion: str | None


@dataclass(frozen=True)
class Things:
    """The thing in each frame, (T,): its share of the frame, its centre, its moments, whether it shows whole."""

    area: np.ndarray
    x: np.ndarray
    y: np.ndarray
    threefold: np.ndarray  # complex
    fourfold: np.ndarray
    is_whole: np.ndarray


def find(frames: np.ndarray) -> Finding:
    """frames: (T, H, W, 3) in 0..1, square, of some 24 frames or more with one look and motion.

    Something that passes by shows whole in any two chunks, but not in any one.
    """
    saturation = frames.max(-1) - frames.min(-1)
    cover = np.clip((saturation - SEEN[0]) / (SEEN[1] - SEEN[0]), 0, 1)
    tone = frames.mean(-1)
    background, scene = _place(tone)
    things = _things(cover)
    if things.area.max() < 0.004:
        return Finding(None, None, None, background, _ground_motion(tone, cover) if scene == "ground" else None)
    shape = _shape(things)
    return Finding(_colour(frames, cover), shape, _size(things), background, _motion(things, shape, scene, tone, cover))


def _place(tone: np.ndarray) -> tuple[str, str]:
    """Background and scene."""
    size = tone.shape[1]
    part = lambda y, x: tone[:, int(y[0] * size) : int(y[1] * size), int(x[0] * size) : int(x[1] * size)]  # noqa: E731
    corners = np.concatenate([part((0, 0.12), (0, 0.2)), part((0, 0.12), (0.8, 1))], axis=2)
    plain = float(np.median(corners))
    background = min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - plain))
    if abs(np.median(part((0, 0.12), (0.42, 0.58))) - plain) > 0.1:
        return background, "wall"
    if abs(np.median(part((0.92, 1), (0, 0.15))) - plain) > 0.1:
        return background, "ground"
    return background, "air"


def _things(cover: np.ndarray) -> Things:
    size = cover.shape[1]
    grid = (np.arange(size) + 0.5) / size
    mass = np.maximum(cover.sum((1, 2)), 1e-6)
    x, y = (cover.sum(1) @ grid) / mass, (cover.sum(2) @ grid) / mass
    place = (grid[None, None, :] - x[:, None, None]) + 1j * (grid[None, :, None] - y[:, None, None])
    spread = np.sqrt((cover * np.abs(place) ** 2).sum((1, 2)) / mass) + 1e-6
    threefold, fourfold = ((cover * place**k).sum((1, 2)) / mass / spread**k for k in (3, 4))
    edge = np.concatenate([cover[:, :, [0, -1]], cover[:, [0, -1]].transpose(0, 2, 1)], axis=1).max((1, 2))
    area = mass / size**2
    full = np.quantile(area, 0.9)
    return Things(area, x, y, threefold, fourfold, (edge < 0.5) & (np.abs(area / full - 1) < 0.15))


def _colour(frames: np.ndarray, cover: np.ndarray) -> str:
    mean = frames[cover > 0.7].mean(0) if (cover > 0.7).any() else (frames * cover[..., None]).sum((0, 1, 2))

    def likeness(name: str) -> float:
        a, b = (np.asarray(rgb) - np.mean(rgb) for rgb in (mean, COLOURS[name]))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    return max(COLOURS, key=likeness)


def _shape(things: Things) -> str | None:
    if not things.is_whole.any():
        return None
    three, four = (np.median(np.abs(moment[things.is_whole])) for moment in (things.threefold, things.fourfold))
    return "triangle" if three > TRIANGLE else "square" if four > SQUARE else "ball"


def _size(things: Things) -> str:
    radius = np.sqrt(np.quantile(things.area, 0.9) / np.pi)
    return "small" if radius < np.mean(list(SIZES.values())) else "big"


def _motion(things: Things, shape: str | None, scene: str, tone: np.ndarray, cover: np.ndarray) -> str | None:
    if scene == "ground":
        return _ground_motion(tone, cover)
    shown = things.area > 0.3 * np.quantile(things.area, 0.9)
    x, y = things.x, things.y
    both = shown[1:] & shown[:-1]
    if scene == "wall":
        steps = np.diff(x)[both]
        steps = steps[np.abs(steps) < 0.1]
        drift = np.median(steps) if len(steps) else 0.0
        return None if abs(drift) < 0.003 else f"pass_{_side(drift)}"
    wander = x[shown].std(), y[shown].std()
    if max(wander) < STILL:
        fold = 3 if shape == "triangle" else 4
        moment = things.threefold if fold == 3 else things.fourfold
        turn = np.angle(moment[1:] * moment[:-1].conj())[both].mean() / fold
        return None if abs(turn) < 0.02 or shape == "ball" else f"spin_{_side(turn)}"
    if wander[0] < STILL:
        return "bounce"
    if wander[1] < STILL:
        return "swing"
    lag = max(1, len(x) // 8)
    vx, vy = x[lag:] - x[:-lag], y[lag:] - y[:-lag]
    return f"orbit_{_side((vx[:-lag] * vy[lag:] - vy[:-lag] * vx[lag:]).sum())}"


def _ground_motion(tone: np.ndarray, cover: np.ndarray) -> str | None:
    size = tone.shape[1]
    below = slice(int((GROUND_TOP + 0.05) * size), size)
    rows = (tone[:, below] * (cover[:, below] < 0.2)).mean(1)
    wave = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size / GROUND_PERIOD)
    phase = (rows - rows.mean(1, keepdims=True)) @ wave
    turn = np.angle((phase[1:] * phase[:-1].conj()).sum())
    return None if abs(turn) < 0.05 else f"scroll_{_side(turn)}"


def _side(value: float) -> str:
    return "right" if value > 0 else "left"


def truth(clip: Clip, chunk: int) -> Finding:
    act = clip.acts[chunk]
    return Finding(act.colour, clip.shape, clip.size, clip.background, act.motion)


def is_steady(clip: Clip, chunk: int) -> bool:
    """Whether nothing changes in this chunk."""
    here, last = clip.acts[chunk], clip.acts[max(0, chunk - 1)]
    return (here.colour, here.motion) == (last.colour, last.motion)


def count_right(pairs: list[tuple[Finding, Finding]]) -> dict[str, float]:
    """Share of (found, wanted) pairs that agree, by field, and in colour, shape and motion at once."""
    right = {f.name: np.mean([getattr(a, f.name) == getattr(b, f.name) for a, b in pairs]) for f in fields(Finding)}
    together = [(a.colour, a.shape, a.motion) == (b.colour, b.shape, b.motion) for a, b in pairs]
    return {**{k: float(v) for k, v in right.items()}, "together": float(np.mean(together))}


def _vae_there_and_back() -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from latents import normalised
    from sample import decode_chunks, load_vae

    vae = load_vae("cpu")

    def through(video: np.ndarray) -> np.ndarray:
        chunks = torch.from_numpy(video).permute(0, 3, 1, 2).unflatten(0, (-1, FRAMES_PER_CHUNK))
        return decode_chunks(vae, normalised(vae, chunks).float().flatten(0, 1).transpose(0, 1)[None])[0]

    return through


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--vae", action="store_true", help="of what the VAE makes of them")
    options = parser.parse_args()
    import logging

    from trainer import start_logging

    start_logging()
    through = _vae_there_and_back() if options.vae else lambda video: video
    pairs = []
    for seed in range(options.clips):
        clip, chunk = sample_clip(seed), seed % 5
        if is_steady(clip, chunk) and is_steady(clip, chunk + 1):
            start = chunk * FRAMES_PER_CHUNK
            frames = render(clip, start, start + 2 * FRAMES_PER_CHUNK, options.size).permute(0, 2, 3, 1).numpy()
            found = find(through(frames))
            pairs.append((found, truth(clip, chunk)))
            if found != truth(clip, chunk):
                logging.info("%d: %s, in truth %s", seed, found, truth(clip, chunk))
    logging.info("%d pairs of chunks: %s", len(pairs), count_right(pairs))


if __name__ == "__main__":
    main()
