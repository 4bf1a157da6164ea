"""JSON from files that anybody may have written: bounded in size and depth before anything is made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .regular_file import CheckpointError, open_regular

MAX_BYTES = 8 * 2**20  # what describes Helios takes 150 KB at most: an index of its 1101 tensors, or their header
MAX_DEPTH = 32
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    with open_regular(file) as (stream, facts):
        if facts.size > MAX_BYTES:
            raise CheckpointError(f"{file} has {facts.size} bytes, too many for a description. Download it again.")
        text = stream.read(MAX_BYTES)
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is no valid JSON ({error}). Download it again.") from error


def read_json_if_there(file: Path) -> dict[str, Any]:
    """`read_json`; an empty object where there is no such file."""
    return read_json(file) if os.path.exists(file) else {}  # unlike Path.exists, never raises


def parse_json(text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds. Raises ValueError; NaN and Infinity, which Python would take, are no JSON."""
    try:
        values = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    if not _is_shallow(values):
        raise ValueError(TOO_DEEP)
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _is_shallow(values: Any) -> bool:
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return True
    return False
