"""Which version of the pack this is, by its sources: server and workers must have the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
FLOORS = ("helios_core", "host")  # what a worker runs


def digest(pack: Path) -> str:
    """Of the sources that a worker runs."""
    found = hashlib.sha256()
    for floor in FLOORS:
        for file in sorted((pack / floor).rglob("*.py")):
            content = file.read_bytes()
            found.update(f"{file.relative_to(pack).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


VERSION = digest(PACK)  # as it was when ComfyUI imported it: later its files may be others


def check_version(expected: str) -> None:
    """Raise RuntimeError in a worker whose server is of another version."""
    if expected != VERSION:
        raise RuntimeError(
            f"ComfyUI-Helios in {PACK} is not the version that this ComfyUI runs. Restart ComfyUI if the pack was "
            "updated meanwhile; on another machine, install the same version there"
        )
