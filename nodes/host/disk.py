"""What a full disk says."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


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
