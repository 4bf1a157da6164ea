"""One shim for what only newer hosts know (0.3.75 raises TypeError for them)."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

NEWER = ("search_aliases", "advanced")


def schema(**kwargs: Any) -> io.Schema:
    """`io.Schema` without the fields this host does not know, such as `search_aliases`."""
    return io.Schema(**_known(io.Schema, kwargs))


def advanced(make: type, *args: Any, **kwargs: Any) -> Any:
    """An input that newer hosts fold away under "advanced"."""
    return make(*args, **_known(make, {**kwargs, "advanced": True}))


def _known(make: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters
    return {name: value for name, value in kwargs.items() if name in parameters or name not in NEWER}
