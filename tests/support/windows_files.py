"""Files as Windows keeps them: what is open or mapped is neither removed nor renamed, and nothing takes its place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells what is open")

SHARING_VIOLATION = 32
CHANGED = {"replace": 2, "rename": 2, "unlink": 1, "remove": 1}  # functions of os, and how many paths each is given


@contextmanager
def windows_files() -> Iterator[None]:
    """While the context lasts. Whoever opens a file counts: Python, FFmpeg, safetensors."""
    with pytest.MonkeyPatch.context() as patch:
        for name, paths in CHANGED.items():
            patch.setattr(os, name, refusing(getattr(os, name), paths))
        yield


def refusing(function: Callable[..., None], paths: int) -> Callable[..., None]:
    def checked(*args: Any, **kwargs: Any) -> None:
        for path in args[:paths]:
            if not kwargs and is_held(path):  # with them it is a name in an open folder
                error = PermissionError(errno.EACCES, "The file is used by another process", str(path))
                error.winerror = SHARING_VIOLATION
                raise error
        function(*args, **kwargs)

    return checked


def is_held(path: Any) -> bool:
    """Whether this process has the file open or mapped."""
    real = os.path.realpath(path)
    if real in opened_files():
        return True
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return any(line.rstrip().endswith(f" {real}") for line in maps)


def opened_files() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # another thread may close it on the way, and listing has one of its own
            yield os.readlink(f"/proc/self/fd/{number}")
