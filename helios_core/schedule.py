"""Sigmas and timesteps of the three variants. Pure functions in float64 on the CPU.

Their results are the same on every processor: IEEE rounds each operation here correctly, except for one `exp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .config import CHUNK_LATENTS, NATIVE_HEIGHT, NATIVE_WIDTH, PATCH, SPATIAL_SCALE, Variant, check_multiple, is_number
from .drift import AntiDrift
from .guidance import cfg, cfg_zero_star
from .quoting import quoted

Solver = Literal["unipc", "euler", "dmd"]
Guidance = Literal["cfg", "cfg_zero_star"]
TimeShift = Literal["exponential", "linear"]
ShiftLevel = Literal["stage", "stage_below"]
CHOICES: dict[str, tuple[str | None, ...]] = {
    "variant": get_args(Variant),
    "solver": get_args(Solver),
    "guidance": get_args(Guidance),
    "time_shift": (*get_args(TimeShift), None),
    "shift_level": get_args(ShiftLevel),
}

SIGMA_MAX = 0.999
TRAIN_STEPS = 1000
# Outside of these a shift turns float64 sigmas into 1, 0 or NaN: exp(30) is 1e13, and exp(30.5) rounds 0.999 to 1.
MU_RANGE: dict[str | None, tuple[float, float]] = {
    "linear": (0.0, 1e13),
    "exponential": (-30.0, 30.0),
    None: (-math.inf, math.inf),
}
GAMMA_MAX = 1 / 3  # of four values, no two can be correlated more negatively


@dataclass(frozen=True)
class Schedule:
    """How a video is denoised: everything about sampling that is a property of the variant, not of the graph.

    More than one entry in `steps` makes a pyramid, lowest resolution first. A guidance_scale up to 1 is no guidance.
    """

    variant: Variant
    steps: tuple[int, ...]
    solver: Solver
    time_shift: TimeShift | None
    guidance_scale: float = 1.0
    guidance: Guidance = "cfg"
    zero_init: bool = False  # CFG-Zero*: predict no flow at all in the first `zero_steps` + 1 steps of stage 0
    zero_steps: int = 1
    amplify_first_chunk: bool = False  # twice the steps in every stage of a video's first chunk
    anti_drift: AntiDrift | None = None
    # The level whose tokens set a stage's shift. Training and the authors' own inference take the stage's; diffusers
    # (0.42.1) asks before it has upsampled, and so takes the stage below's.
    shift_level: ShiftLevel = "stage"
    # Where in training's noise each stage begins and the last one ends; an official folder brings its own.
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = GAMMA_MAX
    shift_tokens: tuple[int, int] = (256, 4096)
    shift_mu: tuple[float, float] = (0.5, 1.15)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {quoted(value)}.")
        for name in ("gamma", "stage_range", "shift_tokens", "shift_mu"):
            values = getattr(self, name) if name != "gamma" else (self.gamma,)
            if not isinstance(values, tuple) or not all(map(is_number, values)):
                raise ValueError(f"{name} must be made of finite numbers, got {quoted(getattr(self, name))}.")
        if not self.steps or any(steps < 1 for steps in self.steps):
            raise ValueError(f"Every stage needs at least 1 step, got {self.steps}.")
        if len(self.steps) > 1 and len(self.steps) != len(self.stage_range) - 1:
            raise ValueError(
                f"{len(self.steps)} stages of steps {self.steps} do not fit the {len(self.stage_range) - 1} stages of "
                f"the pyramid's range {self.stage_range}."
            )
        if not 0 < self.gamma <= GAMMA_MAX:
            raise ValueError(
                f"gamma must be above 0 and at most 1/3, got {self.gamma}: noise that is correlated more than that "
                "within 2 x 2 blocks does not exist."
            )
        points = [int(min(max(x, 0), 1) * TRAIN_STEPS) for x in self.stage_range]
        if points != sorted(set(points)) or (*self.stage_range[:1], *self.stage_range[-1:]) != (0, 1):
            raise ValueError(
                f"stage_range must ascend from 0 to 1 by more than {1 / TRAIN_STEPS} at a time, got "
                f"{quoted(self.stage_range)}."
            )
        if not 0 < self.shift_tokens[0] < self.shift_tokens[1]:
            raise ValueError(
                "shift_tokens (base_image_seq_len, max_image_seq_len) must ascend from above 0, got "
                f"{self.shift_tokens}."
            )
        if self.solver == "dmd" and len(self.steps) == 1:
            raise ValueError("The DMD solver re-noises within the stages of a pyramid; give steps for each stage.")
        if self.amplify_first_chunk and self.solver != "dmd":
            raise ValueError("Only the Distilled schedule (solver 'dmd') can amplify the first chunk.")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def is_pyramid(self) -> bool:
        return len(self.steps) > 1

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width must be multiples of: the lowest stage still has whole 2 x 2 patches."""
        return SPATIAL_SCALE * PATCH * 2 ** (len(self.steps) - 1)

    def steps_in_chunk(self, index: int) -> int:
        """Network steps of the chunk with this index in its video."""
        return sum(self.steps) * (2 if self.amplify_first_chunk and index == 0 else 1)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for a pixel size this schedule cannot make, naming the nearest that it can."""
        check_multiple(width, height, self.size_multiple, f"the {self.variant} schedule can make")
        stages(self, height // SPATIAL_SCALE, width // SPATIAL_SCALE, first_chunk=True)  # raises if it has no steps

    def guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """The guided flow from the flows of both prompts, (B, 16, 9, h, w)."""
        rule = cfg_zero_star if self.guidance == "cfg_zero_star" else cfg
        return rule(cond, uncond, self.guidance_scale)

    def zero_flow(self, stage: int, step: int) -> bool:
        """Whether CFG-Zero* replaces the flow of this step by zeros."""
        return (
            self.guided
            and self.guidance == "cfg_zero_star"
            and self.zero_init
            and stage == 0
            and (step <= self.zero_steps)
        )


BASE = Schedule("base", (50,), "unipc", "exponential", guidance_scale=5.0)
MID = Schedule(
    "mid", (20, 20, 20), "unipc", "exponential", guidance_scale=5.0, guidance="cfg_zero_star", zero_init=True
)
DISTILLED = Schedule("distilled", (2, 2, 2), "dmd", "linear", amplify_first_chunk=True)
PRESETS: dict[Variant, Schedule] = {"base": BASE, "mid": MID, "distilled": DISTILLED}


# What a `scheduler_config.json` may say of the things that are built in here.
FIXED: dict[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "shift": 1.0,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "thresholding": False,
    "disable_corrector": [],
    "solver_p": None,
}


def schedule_from_config(variant: Variant, scheduler: Mapping[str, Any], model_index: Mapping[str, Any]) -> Schedule:
    """The variant's preset, corrected by a repository's `scheduler_config.json` and `model_index.json`.

    Raises ValueError for what is not known or cannot be sampled.
    """
    preset = PRESETS[variant]
    for name, known in {**FIXED, "stages": len(preset.steps)}.items():
        if (value := scheduler.get(name, known)) != known:
            raise ValueError(
                f"scheduler_config.json has {name} {quoted(value)}; only {known!r} is known for "
                f"Helios-{variant.title()}."
            )
    time_shift = scheduler.get("time_shift_type", preset.time_shift or "exponential")
    dynamic = scheduler.get("use_dynamic_shifting", preset.time_shift is not None)
    zero_star = model_index.get("is_cfg_zero_star", preset.guidance == "cfg_zero_star")
    for name, value in (("use_dynamic_shifting", dynamic), ("is_cfg_zero_star", zero_star)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {quoted(value)}.")
    stage_range = scheduler.get("stage_range", preset.stage_range)
    changes: dict[str, Any] = {
        "time_shift": time_shift if dynamic else None,
        "gamma": scheduler.get("gamma", preset.gamma),
        "stage_range": tuple(stage_range) if isinstance(stage_range, list) else stage_range,
        "shift_tokens": (
            scheduler.get("base_image_seq_len", preset.shift_tokens[0]),
            scheduler.get("max_image_seq_len", preset.shift_tokens[1]),
        ),
        "shift_mu": (
            scheduler.get("base_shift", preset.shift_mu[0]),
            scheduler.get("max_shift", preset.shift_mu[1]),
        ),
    }
    if preset.solver != "dmd":
        changes["solver"] = scheduler.get("scheduler_type", preset.solver)
        changes["guidance"] = "cfg_zero_star" if zero_star else "cfg"
    schedule = replace(preset, **changes)
    schedule.check_size(NATIVE_HEIGHT, NATIVE_WIDTH)
    return schedule


@dataclass(frozen=True)
class Stage:
    """One pyramid level: the steps it takes and how it is entered."""

    timesteps: Tensor  # (N,) float64 in train-step units, descending
    sigmas: Tensor  # (N + 1,) float64, ends in 0
    entry: tuple[float, float] | None  # weights (alpha, beta) of `renoise` on entering it; None for the first stage


def stage_tokens(schedule: Schedule, index: int, height: int, width: int) -> int:
    """Tokens of a chunk that set a stage's shift; height and width are the latents' at full resolution."""
    level = max(0, index - 1) if schedule.shift_level == "stage_below" else index
    scale = 2 ** (len(schedule.steps) - 1 - level)
    return CHUNK_LATENTS * (height // scale) * (width // scale) // (PATCH * PATCH)


def dynamic_shift_mu(tokens: int, schedule: Schedule) -> float:
    """The mu of `shift_time` for a stage: linear in the number of its tokens, and extrapolated beyond both ends."""
    (low, high), (mu_low, mu_high) = schedule.shift_tokens, schedule.shift_mu
    slope = (mu_high - mu_low) / (high - low)
    return tokens * slope + (mu_low - slope * low)


def shift_time(sigmas: Tensor, kind: TimeShift | None, mu: float) -> Tensor:
    """Move sigmas (N,) towards 1 by mu; 0 stays 0."""
    if kind is None:
        return sigmas
    weight = math.exp(mu) if kind == "exponential" else mu
    return weight / (weight + (1 / sigmas - 1))


def stages(schedule: Schedule, height: int, width: int, first_chunk: bool) -> tuple[Stage, ...]:
    """Resolve a schedule for chunks of 9 latent frames; height and width are the latents' at full resolution.

    Raises ValueError where that many latents are shifted out of all steps.
    """
    result = []
    for index, steps in enumerate(schedule.steps):
        tokens = stage_tokens(schedule, index, height, width)
        mu = dynamic_shift_mu(tokens, schedule)
        lowest, highest = MU_RANGE[schedule.time_shift]
        if not lowest < mu < highest:
            raise ValueError(
                f"The schedule shifts a stage of {tokens} tokens by {mu:.4g}, which leaves it no steps to take "
                f"({schedule.time_shift}: above {lowest:.4g} and below {highest:.4g}). Make a smaller video, or take "
                "the shifts in scheduler_config.json from the model's repository."
            )
        amplified = schedule.amplify_first_chunk and first_chunk
        sigmas = shift_time(_grid(schedule, 2 * steps if amplified else steps), schedule.time_shift, mu)
        entry = _entry_weights(schedule, index) if index else None
        result.append(Stage(_timesteps(schedule, index, sigmas[:-1]), sigmas, entry))
    return tuple(result)


def _grid(schedule: Schedule, steps: int) -> Tensor:
    """A stage's sigmas before they are shifted, (N + 1,), ends in 0."""
    if schedule.solver == "dmd":
        # The distilled model was trained on grids of one step more, without the last but one sigma.
        grid = np.linspace(SIGMA_MAX, _last_sigma(), steps + 1)[:-1]
    elif schedule.is_pyramid:
        grid = np.linspace(SIGMA_MAX, _last_sigma(), steps)
    else:
        grid = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    return torch.cat([torch.from_numpy(grid), torch.zeros(1, dtype=torch.float64)])


def _timesteps(schedule: Schedule, index: int, sigmas: Tensor) -> Tensor:
    """What the network is told at a stage's shifted sigmas (N,)."""
    if not schedule.is_pyramid:
        return sigmas * TRAIN_STEPS
    low, high = _timestep_range(schedule, index)
    if schedule.time_shift is None:
        points = len(sigmas) + (1 if schedule.solver == "dmd" else 0)
        return torch.from_numpy(np.linspace(high, low, points)[: len(sigmas)])
    return low + sigmas * (high - low)


def _last_sigma() -> float:
    """The last point before 0 of a stage's 1000 sigmas."""
    return float(np.linspace(SIGMA_MAX, 0, TRAIN_STEPS + 1)[-2])


def _global_sigmas() -> np.ndarray:
    """The training grid (1000,), from 0.999 down to 0."""
    return np.flip(1.0 - np.linspace(1, 1 / TRAIN_STEPS, TRAIN_STEPS + 1))[:-1]


def _stage_start(schedule: Schedule, index: int) -> float:
    """Sigma of the training grid where a stage begins."""
    return float(_global_sigmas()[int(schedule.stage_range[index] * TRAIN_STEPS)])


def _entry_weights(schedule: Schedule, index: int) -> tuple[float, float]:
    """Weights of the doubled latents and of the block noise at a stage's start (pyramidal flow matching, eq. 15)."""
    sigma = _stage_start(schedule, index)
    alpha = 1 / (math.sqrt(1 + 1 / schedule.gamma) * sigma + (1 - sigma))
    return alpha, alpha * sigma / math.sqrt(schedule.gamma)


def _timestep_range(schedule: Schedule, index: int) -> tuple[float, float]:
    """Lowest and highest timestep of a stage: the stages share 1000 by the distance in sigma that each covers."""
    count = len(schedule.stage_range) - 1
    distances = []
    for i in range(count):
        start = _stage_start(schedule, i)
        end = _stage_start(schedule, i + 1) if i + 1 < count else 0.0
        if i:  # a stage starts noisier than the one below ended: renoising lowers the share of signal by alpha
            start = 1 - (1 - start) * _entry_weights(schedule, i)[0]
        distances.append(start - end)
    total = sum(distances)
    first = sum(distances[:index]) / total
    last = sum(distances[: index + 1]) / total

    # No boundary for a last bit to cross: of 1000 the published ranges take 256.07 and 614.84. The caps that diffusers
    # (0.42.1) has here, 999 on the timestep and just below 1 on the last share, never bind: the grid begins at 999.0,
    # and the last index is held inside of it.
    timesteps = _global_sigmas() * TRAIN_STEPS
    high = float(timesteps[int(first * TRAIN_STEPS)])
    low = float(timesteps[min(int(last * TRAIN_STEPS), TRAIN_STEPS - 1)])
    inner = np.linspace(high, low, TRAIN_STEPS + 1)[:-1]
    return float(inner.min()), float(inner.max())
