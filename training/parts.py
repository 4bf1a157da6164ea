"""Where the finished parts of Helios-Tiny lie, and how they get there: the official folder layout.

`models/Helios-Tiny/` holds what all variants share (vae, text_encoder, tokenizer), `models/Helios-Tiny-Base/` and its
siblings a transformer, a scheduler and a model_index.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from text import Reader

Variant = Literal["base", "mid", "distilled"]


def models_folder() -> Path:
    return Path(__file__).resolve().parent.parent / "models"


def weights_folder(variant: Variant | None = None) -> Path:
    """The folder of a variant, or of what they share."""
    return models_folder() / ("Helios-Tiny" if variant is None else f"Helios-Tiny-{variant.capitalize()}")


def reader() -> Reader:
    return Reader((weights_folder() / "tokenizer" / "spiece.model").read_bytes())


def load_part(variant: Variant, part: str) -> Any:
    """A finished part in float32."""
    from diffusers import HeliosTransformer3DModel
    from transformers import UMT5EncoderModel

    if part == "text_encoder":
        return UMT5EncoderModel.from_pretrained(weights_folder() / part).float()
    return HeliosTransformer3DModel.from_pretrained(weights_folder(variant) / part).float()
