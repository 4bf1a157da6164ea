"""Which operations run on Apple's devices, by the list that torch is built from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torchgen
import yaml

LIST = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"


@cache
def operations() -> dict[str, dict[str, Any]]:
    """By name and overload: "add.Tensor"."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(LIST.read_text(encoding="utf-8"), loader)
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def runs_on_mps(name: str) -> bool:
    """Whether an operation has a kernel there, or is made of others."""
    entry = operations()[name]
    devices = {key.strip() for keys in entry.get("dispatch", ()) for key in keys.split(",")}
    if "MPS" in devices or any(key.startswith("Composite") for key in devices):
        return True
    if delegate := entry.get("structured_delegate"):
        return runs_on_mps(delegate)
    return not devices
