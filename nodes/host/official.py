"""Official Helios folders below the host's models/diffusers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import folder_paths

from ...helios_core.checkpoint import read_variant
from ...helios_core.schedule import PRESETS, Schedule, schedule_from_config
from .guard import listable

DEPTH = 3  # <user>/<repository>, and one level for people who sort their models


def list_folders() -> list[str]:
    """Names, relative to models/diffusers, of the folders that hold a `transformer/config.json`."""
    return sorted(
        listable(_folders()), key=lambda name: ("distilled" not in name.lower(), name)
    )  # the first is the default


def find_folder(name: str) -> Path:
    """The folder behind a name of `list_folders`. ValueError for any other name."""
    folders = _folders()
    if name not in folders:
        roots = ", ".join(folder_paths.get_folder_paths("diffusers"))
        raise ValueError(
            f"There is no Helios folder {name!r} in {roots} (found: {', '.join(list_folders()) or 'none'}). "
            "Put a copy of the repository there, such as BestWishYsh/Helios-Distilled, without transformer_ode/."
        )
    return folders[name]


def read_schedule(folder: Path) -> tuple[Schedule, str | None]:
    """The variant's schedule by the folder's `model_index.json` and `scheduler/scheduler_config.json`.

    Where these ask for something unknown, the variant's usual schedule, and a warning. Raises ValueError for a folder
    that does not say which variant it is.
    """
    variant = read_variant(folder)
    if variant is None:
        raise ValueError(f"{folder.name} has no model_index.json that names a Helios pipeline; download it again.")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        return schedule_from_config(variant, scheduler, _read_json(folder / "model_index.json")), None
    except (ValueError, TypeError) as error:
        return PRESETS[variant], f"{error} The loader gives out the usual schedule of Helios-{variant.title()}."


def _folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for parent, names, _ in os.walk(root, followlinks=True):
            path = Path(parent)
            config = path / "transformer" / "config.json"
            if config.is_file():
                if _may_be_helios(config):
                    found.setdefault(path.relative_to(root).as_posix(), path)
                names.clear()
            elif len(path.relative_to(root).parts) >= DEPTH:
                names.clear()
    return found


def _may_be_helios(config: Path) -> bool:
    """Not another model's repository. A damaged file stays on the list: loading it says what is wrong with it."""
    try:
        values = _read_json(config)
    except ValueError:
        return True
    return not isinstance(values, dict) or "Helios" in str(values.get("_class_name", "Helios"))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
