"""The procedural world of Helios-Tiny: clips of one coloured thing that moves for ever, with plain English captions.

Everything is a function of a seed. A clip is a list of acts, one a chunk of 33 frames at 24 fps, so that its look can
change on the way; an omitted colour has to be remembered, and "its first colour" is known to the anchor alone.
Lengths are fractions of the frame's side, so that a clip can be rendered at any size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FRAMES_PER_CHUNK = 33
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.75, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.95),
    "pink": (0.95, 0.25, 0.80),
}
SHAPES = ("ball", "square", "triangle")
SIZES = {"small": 0.105, "big": 0.155}  # radius of the ball; the other shapes have its area
BACKGROUNDS = {"black": 0.06, "gray": 0.58, "white": 0.94}
MOTIONS = {
    "orbit_right": "circles clockwise",
    "orbit_left": "circles counterclockwise",
    "bounce": "bounces up and down",
    "swing": "swings from side to side",
    "spin_right": "spins clockwise",
    "spin_left": "spins counterclockwise",
    "scroll_left": "stands while the ground scrolls to the left",
    "scroll_right": "stands while the ground scrolls to the right",
    "pass_left": "passes behind a wall to the left",
    "pass_right": "passes behind a wall to the right",
}
SCENES = {motion: {"scroll": "ground", "pass": "wall"}.get(motion.split("_")[0], "air") for motion in MOTIONS}

GROUND_TOP = 0.78
GROUND_PERIOD = 0.25  # of the stripes
GROUND_TONES = (0.18, 0.40)
WALL = (0.33, 0.67)
WALL_TONE = 0.30
ORBIT_RADIUS = 0.21
SWING_REACH = 0.26
BOUNCE_HEIGHT = 0.38
LANE = 1.62  # what something that passes by travels until it is back where it was; it shows on 1 plus its width

# Frames a cycle takes.
ORBIT_FRAMES = 54
BOUNCE_FRAMES = 36
SWING_FRAMES = 48
SPIN_FRAMES = 66
LANE_FRAMES = 78
SCROLL_FRAMES = 20  # one period of the stripes
CHANGE_FRAMES = 12  # from one look or motion to the next


@dataclass(frozen=True)
class Act:
    """What one chunk shows and says."""

    colour: str
    motion: str
    caption: str


@dataclass(frozen=True)
class Clip:
    shape: str
    size: str
    background: str
    acts: tuple[Act, ...]
    phase: float  # where in their cycles the motions start, 0..1
    centre: tuple[float, float]  # (x, y)

    @property
    def frames(self) -> int:
        return len(self.acts) * FRAMES_PER_CHUNK


def is_possible(shape: str, size: str, motion: str) -> bool:
    """A ball's spin cannot be seen, and something big never shows whole beside the wall."""
    scene = SCENES[motion]
    return not (motion.startswith("spin") and shape == "ball") and not (scene == "wall" and size == "big")


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination never occurs in training; every pair of its words does."""
    numbers = list(COLOURS).index(colour), SHAPES.index(shape), list(MOTIONS).index(motion)
    return (2 * numbers[0] + 5 * numbers[1] + numbers[2]) % 11 == 0


def combinations(held_out: bool) -> Iterator[tuple[str, str, str]]:
    """(colour, shape, motion) of every thing that there is in training, or of every one that is held out."""
    for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS):
        if is_possible(shape, "small", motion) and is_held_out(colour, shape, motion) == held_out:
            yield colour, shape, motion


def describe(
    rng: np.random.Generator, size: str | None, colour: str | None, shape: str, motion: str, background: str | None
) -> str:
    """A caption in one of a few wordings; what is None is not told. The colour may be "first": the one at the start."""
    words = ["a", size, None if colour == "first" else colour, shape]
    thing = " ".join(word for word in words if word) + (" in its first colour" if colour == "first" else "")
    deed = MOTIONS[motion]
    if background is None:
        text = f"{thing} {deed}"
    else:
        place = f"on a {background} background"
        order = rng.choice(3, p=(0.6, 0.2, 0.2))
        text = (f"{thing} {deed} {place}", f"{place}, {thing} {deed}", f"{thing} {place} {deed}")[order]
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text


def sample_clip(seed: int, chunks: int = 6, held_out: bool = False) -> Clip:
    """A random clip; with `held_out` of a combination that training never shows, and steady."""
    rng = np.random.default_rng(seed)
    pick = lambda items: items[rng.integers(len(items))]  # noqa: E731
    things = list(combinations(held_out))
    motion = pick([m for m in MOTIONS if any(thing[2] == m for thing in things)])
    colour, shape, _ = pick([thing for thing in things if thing[2] == motion])
    size = pick([size for size in SIZES if is_possible(shape, size, motion)])
    background = pick(list(BACKGROUNDS))
    plan = [(colour, motion, colour)] * chunks  # (colour, motion, the colour that is told)
    if not held_out:
        plan = _with_changes(rng, plan, shape)
    acts = []
    for number, (colour, motion, told) in enumerate(plan):
        if number > 0 and told != "first" and rng.random() < 0.15:
            told = None
        caption = describe(
            rng,
            size if rng.random() < 0.85 else None,
            told,
            shape,
            motion,
            background if rng.random() < 0.85 else None,
        )
        acts.append(Act(colour, motion, caption))
    for number, act in enumerate(acts):  # a change has to be told in the chunk in which it happens
        is_new = number > 0 and act.colour != acts[number - 1].colour
        if is_new and act.colour not in act.caption and "first" not in act.caption:
            acts[number] = replace(act, caption=describe(rng, size, act.colour, shape, act.motion, background))
    centre = (0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05))
    return Clip(shape, size, background, tuple(acts), rng.random(), centre)


def _with_changes(rng, plan, shape):
    """A plan of acts with no change, another colour, another motion of the same scene, or another colour and back."""
    chunks = len(plan)
    colour, motion, _ = plan[0]
    kind = rng.choice(["steady", "colour", "motion", "return"], p=(0.45, 0.2, 0.2, 0.15))
    if chunks < 2 or kind == "steady":
        return plan
    at = int(rng.integers(1, chunks))
    if kind == "motion":
        others = [m for m in MOTIONS if SCENES[m] == SCENES[motion] and m != motion]
        others = [m for m in others if is_possible(shape, "small", m) and not is_held_out(colour, shape, m)]
        other = others[rng.integers(len(others))] if others else motion
        return plan[:at] + [(colour, other, colour)] * (chunks - at)
    others = [c for c in COLOURS if c != colour and not is_held_out(c, shape, motion)]
    other = others[rng.integers(len(others))]
    if kind == "colour" or chunks < 3:
        return plan[:at] + [(other, motion, other)] * (chunks - at)
    at = int(rng.integers(1, max(2, chunks - 3)))
    back = int(rng.integers(min(at + 3, chunks - 1), chunks))
    middle = [(other, motion, other)] * (back - at)
    return plan[:at] + middle + [(colour, motion, "first")] * (chunks - back)


@dataclass(frozen=True)
class Track:
    """Where a clip's thing is in each frame, all (T,): place of its centre, angle, colour, how far the ground went."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray  # radians, clockwise on the screen
    colour: np.ndarray  # (T, 3)
    ground: np.ndarray


def follow(clip: Clip) -> Track:
    """The motions of all frames. Cycles are summed up frame by frame, so that a change of direction never jumps."""
    count = clip.frames
    chunk = np.arange(count) // FRAMES_PER_CHUNK
    progress = np.clip((np.arange(count) % FRAMES_PER_CHUNK + 1) / CHANGE_FRAMES, 0, 1)
    new = np.where(chunk > 0, progress * progress * (3 - 2 * progress), 1.0)  # weight of this act against the last
    before = np.maximum(chunk - 1, 0)

    def blend(values: np.ndarray) -> np.ndarray:  # (chunks, ...) -> (T, ...)
        weight = new.reshape(-1, *[1] * (values.ndim - 1))
        return weight * values[chunk] + (1 - weight) * values[before]

    def cycle(motions: dict[str, float], frames: int) -> np.ndarray:  # summed turns
        rates = np.array([motions.get(act.motion, 0.0) for act in clip.acts])
        return np.cumsum(blend(rates)) / frames

    orbit = 2 * math.pi * (clip.phase + cycle({"orbit_right": 1, "orbit_left": -1}, ORBIT_FRAMES))
    angle = 2 * math.pi * cycle({"spin_right": 1, "spin_left": -1}, SPIN_FRAMES)
    ground = GROUND_PERIOD * (clip.phase + cycle({"scroll_right": 1, "scroll_left": -1}, SCROLL_FRAMES))
    lane = LANE * ((clip.phase + cycle({"pass_right": 1, "pass_left": -1}, LANE_FRAMES)) % 1) - (LANE - 1) / 2
    time = np.arange(count)
    hop = (clip.phase + time / BOUNCE_FRAMES) % 1
    swing = np.sin(2 * math.pi * (clip.phase + time / SWING_FRAMES))
    x0, y0 = (np.full(count, value) for value in clip.centre)
    radius = SIZES[clip.size]
    depth = {"ball": 1.0, "square": 0.886, "triangle": 0.778}[clip.shape] * radius  # from its centre to its foot
    places = {
        "orbit": (x0 + ORBIT_RADIUS * np.cos(orbit), y0 + ORBIT_RADIUS * np.sin(orbit)),
        "bounce": (x0, y0 + BOUNCE_HEIGHT / 2 - BOUNCE_HEIGHT * 4 * hop * (1 - hop)),
        "swing": (x0 + SWING_REACH * swing, y0),
        "spin": (x0, y0),
        "scroll": (x0, np.full(count, GROUND_TOP - depth)),
        "pass": (lane, y0),
    }
    table = np.stack([np.stack(places[act.motion.split("_")[0]]) for act in clip.acts])  # (chunks, 2, T)
    here, last = table[chunk, :, time], table[before, :, time]  # (T, 2)
    place = new[:, None] * here + (1 - new[:, None]) * last
    colour = blend(np.array([COLOURS[act.colour] for act in clip.acts]))
    return Track(place[:, 0], place[:, 1], angle, colour, ground)


def render(
    clip: Clip, start: int = 0, stop: int | None = None, size: int = 64, every: int = 1, device: str = "cpu"
) -> Tensor:
    """Frames start, start + every, ... of a clip: (T, 3, size, size) float32 in 0..1, with anti-aliased edges."""
    track = follow(clip)
    which = np.arange(start, clip.frames if stop is None else stop, every)

    def of_frames(values: np.ndarray) -> Tensor:  # (T, ...) -> (T, ..., 1, 1)
        return torch.from_numpy(values[which].astype(np.float32)).to(device)[..., None, None]

    grid = (torch.arange(size, device=device) + 0.5) / size
    x, y = grid[None, None, :], grid[None, :, None]
    scene = SCENES[clip.acts[0].motion]
    tone = torch.full((len(which), size, size), BACKGROUNDS[clip.background], device=device)
    if scene == "ground":
        stripes = (x - of_frames(track.ground)) / GROUND_PERIOD % 1
        light = ((0.25 - (stripes - 0.5).abs()) * GROUND_PERIOD * size + 0.5).clamp(0, 1)
        tones = GROUND_TONES[0] + (GROUND_TONES[1] - GROUND_TONES[0]) * light
        below = ((y - GROUND_TOP) * size + 0.5).clamp(0, 1)
        tone = tone + below * (tones - tone)
    dx, dy = x - of_frames(track.x), y - of_frames(track.y)
    cos, sin = of_frames(np.cos(track.angle)), of_frames(np.sin(track.angle))
    distance = _distance(clip.shape, cos * dx + sin * dy, cos * dy - sin * dx, SIZES[clip.size])
    cover, tone = (0.5 - distance * size).clamp(0, 1)[:, None], tone[:, None]
    frames = tone + cover * (of_frames(track.colour) - tone)
    if scene == "wall":
        middle = (WALL[0] + WALL[1]) / 2
        inside = (((WALL[1] - WALL[0]) / 2 - (x - middle).abs()) * size + 0.5).clamp(0, 1)
        frames = frames + inside * (WALL_TONE - frames)
    return frames


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance to the edge of a shape around 0 with the area of a ball of this radius; y points down."""
    if shape == "ball":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - math.sqrt(math.pi) / 2 * radius
    inner = math.sqrt(math.pi / (3 * math.sqrt(3))) * radius
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - inner
