"""What text_encoder.py and vae.py share: reading and checking one part of a Helios repository in diffusers' layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...helios_core.json_file import read_json
from ...helios_core.quoting import quoted, some
from ...helios_core.regular_file import CheckpointError
from ...helios_core.safetensors_file import DTYPES, StoredTensor, read_headers, read_index
from .shipped import part_path

DOWNLOAD = (
    "Download it from the same Helios repository (BestWishYsh/Helios-Distilled, -Mid or -Base; Helios-Tiny is in this "
    "node pack's)."
)


def part_folder(folder: Path, name: str) -> Path:
    part = part_path(folder, name)
    if not os.path.isdir(part):
        raise CheckpointError(f"{part.parent} has no folder {name!r}. {DOWNLOAD}")
    return part


def part_config(part: Path, fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`part`/config.json. Raises CheckpointError where it has another value than those that the host can build."""
    values = read_json(part / "config.json")
    for name, allowed in fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{part / 'config.json'} has {name} {quoted(values[name])}, but the {part.name} of Helios has "
                f"{' or '.join(map(repr, allowed))}. {DOWNLOAD}"
            )
    return values


def stored_tensors(part: Path, stem: str) -> dict[str, StoredTensor]:
    """What the weight files of a part hold."""
    index = part / f"{stem}.safetensors.index.json"
    stored, _ = read_headers(read_index(index) if os.path.exists(index) else [part / f"{stem}.safetensors"])
    if unreadable := [name for name, x in stored.items() if x.dtype not in DTYPES.values()]:
        raise CheckpointError(f"{part} stores {some(unreadable)} in a type that is none of {some(DTYPES)}. {DOWNLOAD}")
    return stored


def misshapen(part: Path, expected: str, wrong: list[str]) -> CheckpointError:
    return CheckpointError(f"{part} has weights of another shape than {expected}: {some(wrong)}. {DOWNLOAD}")


def check_names(part: Path, given: Any, expected: Any) -> None:
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in {part} do not fit: {len(missing)} missing{': ' if missing else ''}{some(missing)}; "
            f"{len(unexpected)} unexpected{': ' if unexpected else ''}{some(unexpected)}. {DOWNLOAD}"
        )
