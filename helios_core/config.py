"""What a Helios checkpoint is: the transformer's shape and the three published variants."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .quoting import quoted

Variant = Literal["base", "mid", "distilled"]

LATENT_CHANNELS = 16
CHUNK_LATENTS = 9  # latent frames that are denoised together
CHUNK_FRAMES = 33  # pixel frames they decode to: (9 - 1) * 4 + 1
SPATIAL_SCALE = 8  # pixels a latent, in height and width
PATCH = 2  # latents a token, in height and width; in time 1
HISTORY_SIZES = (16, 2, 1)  # latent frames of long, mid and short history
FRAME_RATE = 24
NATIVE_HEIGHT, NATIVE_WIDTH = 384, 640  # the only size the weights were trained at

# What schedules, sizes in pixels and positions in time are made for.
FIXED: dict[str, Any] = {
    "patch_size": (1, PATCH, PATCH),
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
}
LARGEST = 65536  # of any size of a network; its largest matrix can still be counted


def is_number(value: object) -> bool:
    """Whether a value from a file is a finite number; to Python true and false were numbers too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_multiple(width: int, height: int, multiple: int, whose: str, advised: int | None = None) -> None:
    """Raise ValueError, naming the nearest that works, for a size in pixels that is no multiple.

    whose: "a video can have"; advised: the multiple that every schedule takes, which the named one is then of.
    """
    if width % multiple or height % multiple or width < multiple or height < multiple:
        step = advised or multiple
        good = [max(step, round(side / step) * step) for side in (width, height)]
        raise ValueError(
            f"{width}x{height} is no size {whose}: width and height must be multiples of {multiple}. The nearest that "
            f"works{' with every schedule' if advised else ''} is {good[0]}x{good[1]}."
        )


def num_chunks(frames: int) -> int:
    """Chunks that cover this many pixel frames (rounded up, as the reference does)."""
    if frames < 1:
        raise ValueError(f"A video needs at least 1 frame, got {frames}.")
    return math.ceil(frames / CHUNK_FRAMES)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of `HeliosTransformer`; the fields and defaults of the published `transformer/config.json`."""

    patch_size: tuple[int, int, int] = (1, PATCH, PATCH)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_dim: tuple[int, int, int] = (44, 42, 42)
    rope_theta: float = 10000.0
    guidance_cross_attn: bool = True
    zero_history_timestep: bool = True
    has_multi_term_memory_patch: bool = True
    is_amplify_history: bool = False
    history_scale_mode: Literal["scalar", "per_head"] = "per_head"

    def __post_init__(self) -> None:
        sizes = self._fields("int")
        sizes |= {f"{name}[{i}]": getattr(self, name)[i] for name in ("patch_size", "rope_dim") for i in range(3)}
        for name, value in sizes.items():
            if type(value) is not int or not 1 <= value <= LARGEST:
                raise ValueError(f"{name} must be a whole number from 1 to {LARGEST}, got {quoted(value)}.")
        for name, known in FIXED.items():
            if (value := getattr(self, name)) != known:
                raise ValueError(f"{name} is {value}; every published Helios has {known}, and no other is supported.")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, half cosines and half sines, got {self.freq_dim}.")
        if self.inner_dim > LARGEST:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} times attention_head_dim {self.attention_head_dim} "
                f"must be at most {LARGEST}."
            )
        for name, value in self._fields("bool").items():
            if type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {quoted(value)}.")
        for name, value in self._fields("float").items():
            if not is_number(value) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {quoted(value)}.")
        if sum(self.rope_dim) != self.attention_head_dim or any(axis % 2 for axis in self.rope_dim):
            raise ValueError(
                f"rope_dim {self.rope_dim} must be three even numbers that add up to "
                f"attention_head_dim {self.attention_head_dim}."
            )
        if not self.has_multi_term_memory_patch:
            raise ValueError("has_multi_term_memory_patch is false: such a checkpoint has no history, it is no Helios.")
        if self.history_scale_mode not in ("scalar", "per_head"):
            mode = quoted(self.history_scale_mode)
            raise ValueError(f"history_scale_mode must be 'scalar' or 'per_head', got {mode}.")

    def _fields(self, kind: str) -> dict[str, Any]:
        """Those that are declared as this."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type == kind}

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Read a `config.json`; keys that are not ours (`_class_name`, ...) are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in ("patch_size", "rope_dim"):
            given = values.get(name, ())
            if name in values and (not isinstance(given, (list, tuple)) or len(given) != 3):
                raise ValueError(f"{name} must be three whole numbers, got {quoted(given)}.")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
