"""Which videos can be watched: those that are being made, and the newest of those that were."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ...helios_core.config import CHUNK_FRAMES
from .live_file import LiveFile

State = Literal["running", "finished", "stopped"]
KEPT = 8  # sessions that have ended, for pages that still show them


@dataclass
class LiveSession:
    """One run of a node with `live`. Only `state` changes."""

    file: LiveFile
    node_id: str
    frames: int  # of the whole video
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = "running"

    def describe(self) -> dict[str, Any]:
        """What the page shows. rate: frames a second since the first chunk, None until there are two."""
        return {
            "id": self.id,
            "node": self.node_id,
            "state": self.state,
            "frames": self.frames,
            "written": self.file.frames,
            "fps": float(self.file.rate),
            "rate": self.file.rate_of_frames,
            "chunk_frames": CHUNK_FRAMES,
        }


_sessions: dict[str, LiveSession] = {}  # by id, in the order in which they began
_lock = threading.Lock()


def sessions() -> list[LiveSession]:
    with _lock:
        return list(_sessions.values())


def find_session(session_id: str) -> LiveSession | None:
    with _lock:
        return _sessions.get(session_id)


@contextmanager
def on_air(file: LiveFile, node_id: str, frames: int) -> Iterator[LiveSession]:
    """Let pages find the file until it has ended, and a while longer. frames: how many it will have."""
    session = LiveSession(file, node_id, frames)
    with _lock:
        _sessions[session.id] = session
    try:
        yield session
        session.state = "finished"
    finally:
        if session.state == "running":
            session.state = "stopped"
        with _lock:
            ended = [key for key, other in _sessions.items() if other.state != "running"]
            for key in ended[:-KEPT]:
                del _sessions[key]
