"""What a group of workers is made of, wherever they run: processes that are sent bytes, and answer with messages."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .wire import Message

TO_END = 5.0  # s, until a process that does not end is killed
LOG_END = 64 * 1024  # bytes of a log that are looked at
ERROR = re.compile(
    r"(?:\[rank\d+\]:\s*)?((?!Exception (?:ignored )?in\b)(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)"
)


@dataclass(frozen=True)
class Ended:
    """A process is no more. log: what it said last."""

    code: int | None
    log: str


# What comes, from which worker; from None, that the whole group is lost.
Answers = queue.SimpleQueue[tuple[int | None, Message | Ended]]


class Processes(Protocol):
    """Started when made. Whoever made them hears of all that follows in the Answers they were given."""

    @property
    def alive(self) -> bool: ...

    def where(self, rank: int) -> str:
        """A worker's card or machine; empty where there is nothing to tell."""
        ...

    def share(self, file: Path) -> None:
        """Take a file to where all workers find it by its name, before anything that is sent after it."""
        ...

    def send(self, message: bytes) -> None:
        """To all of them. Does not wait: one that hangs reads nothing, and the server must not hang with it."""
        ...

    def end(self) -> None:
        """At once, or once they have had time to."""
        ...


def start_writing(stream: Any) -> queue.SimpleQueue[bytes | None]:
    """What is put there is written, in this order, until None is put, or whoever reads the stream is gone."""
    waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_write, args=(stream, waiting), daemon=True).start()
    return waiting


def _write(stream: Any, waiting: queue.SimpleQueue[bytes | None]) -> None:
    while (message := waiting.get()) is not None:
        rest = memoryview(message)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
        except (OSError, ValueError):  # it has ended, and whoever waits for its answer hears of it
            return


def end_of_log(path: Path) -> str:
    data = path.read_bytes() if path.exists() else b""
    return data[-LOG_END:].decode("utf-8", errors="replace")


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that names an error, or the very last."""
    errors = [found[1] for found in map(ERROR.fullmatch, lines) if found]
    said = (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1]
    return said.strip().rstrip(".")
