"""LoRA files in the host's models/loras."""

from __future__ import annotations

from typing import Any

import folder_paths

from ...helios_core.quoting import quoted
from ..printable import listable
from .diffusion_model import path_in


def list_loras() -> list[str]:
    """Names of the files that the page can show."""
    return listable(folder_paths.get_filename_list("loras"))


def find_lora(name: Any) -> str:
    """The path of a file in models/loras. ValueError for a name of none."""
    path = path_in("loras", name)
    if path is None:
        raise ValueError(
            f"There is no LoRA {quoted(name)} in models/loras. Put it there and refresh the page (R), or choose "
            "another."
        )
    return path
