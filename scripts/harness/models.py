"""A ComfyUI models folder with tiny weights of every variant."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import transformers

from harness.tiny import VARIANTS, make_official_folder

SOURCE = Path(__file__).with_name("tiny.py")


def make_tiny_models(models: Path) -> Path:
    """Write models/diffusers/Helios-{Base,Mid,Distilled}; leaves in place what the present tiny.py has made."""
    for name in ("diffusion_models", "text_encoders", "vae", "upscale_models"):
        (models / name).mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    for variant in VARIANTS:
        folder = models / "diffusers" / f"Helios-{variant.capitalize()}"
        made_by = folder / ".made_by"
        if made_by.is_file() and made_by.read_text() == digest:
            continue
        transformers.utils.logging.disable_progress_bar()
        shutil.rmtree(folder, ignore_errors=True)
        make_official_folder(folder, variant)
        made_by.write_text(digest)
    return models
