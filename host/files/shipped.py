"""Helios-Tiny, which comes with the pack: a folder for each variant, and one for the parts that they share.

No links lead there: they would survive neither the registry's zip file nor Windows.
"""

from __future__ import annotations

import os
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "models"
SHARED = "Helios-Tiny"
SHARED_PARTS = ("text_encoder", "tokenizer", "vae")


def is_shipped(folder: Path) -> bool:
    """Whether a folder is one of the pack's own, which a link may lead to as well."""
    return os.path.dirname(os.path.realpath(folder)) == str(MODELS)


def part_path(folder: Path, part: str) -> Path:
    """Where a part of an official folder lies."""
    return MODELS / SHARED / part if part in SHARED_PARTS and is_shipped(folder) else folder / part
