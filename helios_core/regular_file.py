"""Files as they lie on disk: opened without ever waiting, known again when they have changed, and put in place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import BinaryIO

from .quoting import known_by_its_name, printable

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
AGAIN_AFTER = (0.1, 0.4, 1.5, 3.0)  # s
IN_USE = (5, 32)  # Windows' numbers for it: access is denied, and a sharing violation


@known_by_its_name
class CheckpointError(ValueError):
    """A checkpoint cannot be read. The message names the file, what is wrong with it and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class FileFacts:
    """What tells a file from its later self: writing to it, or putting another in its place, changes one of these."""

    path: Path
    size: int
    mtime_ns: int
    inode: int


def facts_of(path: Path) -> FileFacts | None:
    """The facts of a file as it is now; None for what is no regular file, or cannot be seen."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: of a name that no file can have
        return None
    return _facts(path, status) if stat.S_ISREG(status.st_mode) else None


def check_unchanged(files: Iterable[FileFacts]) -> None:
    """Raise CheckpointError unless the files still are as they were when they were opened."""
    for opened in files:
        if facts_of(opened.path) != opened:
            raise CheckpointError(
                f"{opened.path} has changed since the model was loaded, and is in use: what is in memory may be part "
                "old, part new. Run the graph again, which loads it anew."
            )


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, FileFacts]]:
    """Open a file to read, and say what it was when it was opened.

    Raises CheckpointError for what is not there or no regular file: a pipe would be waited for, a device never ends.
    """
    try:
        # Only with NONBLOCK does opening a pipe that nobody writes to return. Windows knows no such flag, nor needs it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Download it again.") from error
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} cannot be read ({reason}). Check its permissions, or download it again."
        ) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise CheckpointError(f"{path} is {kind}, where a file is expected. Download it again.")
        with open(handle, "rb", closefd=False) as stream:  # Python opens no folder, and then would not close it either
            yield stream, _facts(path, status)
    finally:
        os.close(handle)


def put_in_place(part: Path, target: Path) -> None:
    """Give a finished file its name, in place of what has it.

    Windows refuses while a program has either of them open, as virus scanners have whatever is new: then again, for
    some seconds. What other systems refuse they refuse for good.
    """
    for seconds in AGAIN_AFTER:
        try:
            os.replace(part, target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IN_USE:
                raise
        sleep(seconds)
    os.replace(part, target)


def _facts(path: Path, status: os.stat_result) -> FileFacts:
    return FileFacts(path, status.st_size, status.st_mtime_ns, status.st_ino)
