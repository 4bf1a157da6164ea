"""How run folders and videos are written where other programs write too: ordinary files only, a full disk explained."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...helios_core.regular_file import put_in_place
from ..printable import printable_log

log = printable_log(__name__)

NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error
DAY = 24 * 60 * 60
# Neither follows a link nor waits at a pipe. Windows has no such flags, and lets few people make links.
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn the system's word for a full disk (or quota, or file size limit) into one for the person at the graph."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            error.errno,
            f"There is no room for {what} in {folder} ({error.strerror}). Free some space and run the graph again.",
        ) from error


@contextmanager
def written_whole(target: Path, part: Path) -> Iterator[None]:
    """While `part` is written, which then takes the target's name. Nothing stays of one that could not be finished."""
    try:
        yield
        put_in_place(part, target)
    except OSError as error:
        error.filename = error.filename or str(target)  # that of a full disk names none
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def ordinary(path: str, flags: int) -> int:
    """`opener` for `open`. Raises OSError for what is no file of its own: a link, a pipe, a folder, a device."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a link")
    handle = os.open(path, flags | PLAIN, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no ordinary file")
    return handle


def in_background(clean_up: Callable[[Path], None], folder: Path) -> None:
    """Clean up in a folder while nobody waits for it; the end of the process cuts it short."""

    def work() -> None:
        try:
            clean_up(folder)
        except OSError as error:  # another ComfyUI may be at it
            log.warning("Could not clean up in %s: %s", folder, error)

    threading.Thread(target=work, name="helios-clean-up", daemon=True).start()
