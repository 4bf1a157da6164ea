"""Official Helios folders below the host's models/diffusers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import folder_paths

from ...helios_core.checkpoint import open_checkpoint
from ...helios_core.schedule import Schedule, schedule_from_config

DEPTH = 3  # <user>/<repository>, and one level for people who sort their models


def list_folders() -> list[str]:
    """Names, relative to models/diffusers, of the folders that hold a `transformer/config.json`."""
    return sorted(_folders())


def find_folder(name: str) -> Path:
    """The folder behind a name of `list_folders`. ValueError for any other name."""
    folders = _folders()
    if name not in folders:
        raise ValueError(
            f"No Helios folder {name!r} below models/diffusers; found: {', '.join(sorted(folders)) or 'none'}. "
            "Put a copy of BestWishYsh/Helios-Distilled there (model_index.json, scheduler, text_encoder, tokenizer, "
            "transformer, vae)."
        )
    return folders[name]


def read_schedule(folder: Path) -> Schedule:
    """The variant's schedule, from the folder's `model_index.json` and `scheduler/scheduler_config.json`."""
    variant = open_checkpoint(folder).variant
    if variant is None:
        raise ValueError(f"{folder.name} has no model_index.json that names a Helios pipeline; download it again.")
    return schedule_from_config(
        variant, _read_json(folder / "scheduler" / "scheduler_config.json"), _read_json(folder / "model_index.json")
    )


def _folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for parent, names, _ in os.walk(root, followlinks=True):
            path = Path(parent)
            if (path / "transformer" / "config.json").is_file():
                found.setdefault(path.relative_to(root).as_posix(), path)
                names.clear()
            elif len(path.relative_to(root).parts) >= DEPTH:
                names.clear()
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
