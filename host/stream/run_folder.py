"""The folder that a run with `resume` saves its chunks in: for one process at a time, with a note, deleted when old."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import folder_paths

from ...helios_core.quoting import known_by_its_name, quoted
from ..printable import printable_log
from .plain_files import DAY, ordinary

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = printable_log(__name__)

FOLDER = "helios_resume"  # below the host's output folder
KEPT_RUNS = 3
REMOVED_AT_ONCE = 100
MANY = 100  # other runs, which are not counted further
LOCK, NOTE = "lock", "about.txt"
KEY = re.compile(r"[0-9a-f]{64}")
OUR_FILE = re.compile(rf"chunk_\d{{5}}\.safetensors(\.part)?|[0-9a-f]{{32}}\.part|{LOCK}|{re.escape(NOTE)}")
HELD_ELSEWHERE = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
ATTEMPTS = 5
SHOWN = 200  # characters of what a lock says of its holder
LOCKED_BYTE = 1 << 30  # on Windows, where others cannot read what is locked


@known_by_its_name
class InUse(ValueError):
    """Another process is at work in the folder. Says which."""


def run_folder(key: str) -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER / key


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock the folder, which is made if need be, for this process; the system unlocks it if the process dies.

    A folder without a chunk is deleted at the end. Raises InUse, or ValueError where there can be no such folder.
    """
    lock = _claim(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), lock:
            if not has_chunks(folder):
                _remove(folder, lock)


def has_chunks(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def tidy(folder: Path, note: str) -> None:
    """Begin with a claimed folder: date it now, delete what a crash has left half written, and put the note there.

    Raises ValueError for a folder where a file is to be.
    """
    for entry in folder.iterdir():
        if entry.suffix == ".part" and OUR_FILE.fullmatch(entry.name):
            with contextlib.suppress(PermissionError):  # Windows keeps what somebody reads, and it does no harm
                entry.unlink()
        elif entry.is_dir() and not entry.is_symlink() and OUR_FILE.fullmatch(entry.name):
            raise ValueError(f"{entry} is a folder, where a file is to be saved. Move it away, or switch resume off.")
    os.utime(folder)
    with contextlib.suppress(OSError), open(folder / NOTE, "x", encoding="utf-8", opener=ordinary) as file:
        file.write(note)  # a courtesy: a disk that is full says so when a chunk is saved


def count_others(used: Path) -> int:
    """How many other runs have saved chunks; MANY for more than that."""
    others = (folder for folder in _our_folders(used.parent) if folder != used and has_chunks(folder))
    return sum(1 for _ in itertools.islice(others, MANY))


def remove_old(used: Path) -> None:
    """Delete all runs' folders except the KEPT_RUNS that were used last (`used` is one) and those used within a day.

    One graph may have many nodes that save, and a run that was cut off waits for its user.
    """
    others = [(has_chunks(folder), _used(folder), folder) for folder in _our_folders(used.parent) if folder != used]
    old = [folder for _, when, folder in sorted(others, reverse=True)[KEPT_RUNS - 1 :] if time.time() - when >= DAY]
    for folder in old[-REMOVED_AT_ONCE:]:
        try:
            with claimed(folder):
                for chunk in folder.glob("*.safetensors"):
                    chunk.unlink()
        except (ValueError, OSError) as error:  # another ComfyUI may be at it
            log.warning("Could not delete the saved chunks in %s: %s", folder, error)


def _used(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime
    return 0.0


def _claim(folder: Path) -> BinaryIO:
    """The open lock file of the folder, locked."""
    for _ in range(ATTEMPTS):
        lock = _open_lock(folder)
        if not _lock(lock):
            with lock:
                lock.seek(0)
                holder = lock.read(SHOWN).decode("utf-8", "replace")
            raise InUse(
                f"Another ComfyUI ({quoted(holder, SHOWN)}) is making the same video and saves its chunks in {folder}. "
                "Wait until it has finished, or switch resume off."
            )
        if _is_there(lock, folder / LOCK):
            with contextlib.suppress(OSError):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {platform.node()}".encode())
                lock.flush()
            return lock
        lock.close()  # another process has removed the folder in between
    raise InUse(f"Another ComfyUI is cleaning up the folder {folder}. Run the graph again, or switch resume off.")


def _open_lock(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        return open(folder / LOCK, "a+b", opener=ordinary)
    except OSError as error:
        raise ValueError(
            f"Chunks cannot be saved in the folder {folder}: {error.strerror}. Make it a folder that ComfyUI can "
            "write to, or switch resume off."
        ) from error


def _lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_ELSEWHERE:
            return False
        log.warning("%s cannot be locked (%s): let no other ComfyUI make the same video.", file.name, error.strerror)
    return True


def _is_there(lock: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path, lock: BinaryIO) -> None:
    """A claimed folder of ours. The lock is the last to go, so that nobody else has the folder before."""
    if not _is_ours(folder):
        return
    for file in folder.iterdir():
        if file.name != LOCK:
            file.unlink()
    if sys.platform == "win32":  # where an open file cannot be deleted
        lock.close()
    (folder / LOCK).unlink()
    folder.rmdir()


def _our_folders(root: Path) -> Iterator[Path]:
    """Folders that are named by a key and hold nothing but files of ours. Others are somebody else's."""
    for folder in root.iterdir() if root.is_dir() else ():
        if KEY.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink() and _is_ours(folder):
            yield folder


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return all(OUR_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False) for entry in entries)
    return False  # somebody has just removed it
