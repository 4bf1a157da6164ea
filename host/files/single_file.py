"""Single files in the host's folders of models: transformers in diffusion_models, LoRAs in loras."""

from __future__ import annotations

import contextlib
from typing import Any

import folder_paths

from ...helios_core.quoting import quoted
from ..printable import listable

KINDS = {"diffusion_models": "model", "loras": "LoRA"}  # the host's folder, and what is in it


def list_files(folder: str) -> list[str]:
    """Names of the files that the page can show."""
    return listable(folder_paths.get_filename_list(folder))


def find_file(folder: str, name: Any) -> str:
    """The path of a file in one of the KINDS' folders. ValueError for a name of none."""
    path = full_path(folder, name) if isinstance(name, str) and "\0" not in name else None
    if path is None:
        raise ValueError(
            f"There is no {KINDS[folder]} {quoted(name)} in models/{folder}. Put it there and refresh the page (R), or "
            "choose another."
        )
    return path


def full_path(folder: str, name: str) -> str | None:
    """The path of a file in one of the host's folders; None for a name of none.

    Workflows travel: on Windows, where both slashes part folders, the host lists `sub\\a.safetensors`.
    """
    for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
        with contextlib.suppress(ValueError):  # on Windows, of a text that begins like another drive's path
            if path := folder_paths.get_full_path(folder, spelled):
                return str(path)
    return None
