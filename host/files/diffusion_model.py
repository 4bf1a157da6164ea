"""Single-file models in the host's models/diffusion_models."""

from __future__ import annotations

from typing import Any

import folder_paths

from ...helios_core.quoting import quoted
from ..printable import listable


def list_models() -> list[str]:
    """Names of the files that the page can show."""
    return listable(folder_paths.get_filename_list("diffusion_models"))


def path_in(kind: str, name: Any) -> str | None:
    """The path of a file in a folder of the host's models; None for a name of none."""
    path: str | None = folder_paths.get_full_path(kind, name) if isinstance(name, str) and "\0" not in name else None
    return path


def find_model(name: Any) -> str:
    """The path of a file in models/diffusion_models. ValueError for a name of none."""
    path = path_in("diffusion_models", name)
    if path is None:
        raise ValueError(
            f"There is no model {quoted(name)} in models/diffusion_models. Put it there and refresh the page (R), or "
            "choose another."
        )
    return path
