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
from .mp4 import prompts_beside
from .steering import Steering

State = Literal["running", "finished", "stopped"]
KEPT = 8  # sessions that have ended, for pages that still show them


@dataclass(frozen=True)
class Watched:
    """By what a page knows its video, and how many frames it will have at least."""

    node_id: str  # with those of the subgraphs around it: "5:12"
    workflow: str | None  # node ids are a workflow's own; None for a graph that no page has queued
    frames: int


@dataclass
class LiveSession:
    """One run of a node with `live`. Only `state` changes, and what `steering` holds."""

    file: LiveFile
    watched: Watched
    steering: Steering
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = "running"

    def describe(self) -> dict[str, Any]:
        """What the page shows. frames: None where nobody has said yet when it is to end. rate: frames a second since
        the first chunk, None until there are two.
        """
        return {
            "id": self.id,
            "node": self.watched.node_id,
            "workflow": self.watched.workflow,
            "state": self.state,
            "frames": None if self.steering.endless else self.watched.frames,
            "least": self.watched.frames,
            "written": self.file.frames,
            "fps": float(self.file.rate),
            "rate": self.file.rate_of_frames,
            "chunk_frames": CHUNK_FRAMES,
            "steering": self.steering.describe(),
            "file": self.file.target.is_file(),
            "script": prompts_beside(self.file.target).is_file(),
        }


_sessions: dict[str, LiveSession] = {}  # by id, in the order in which they began
_lock = threading.Lock()


def sessions() -> list[LiveSession]:
    with _lock:
        return list(_sessions.values())


def find_session(session_id: str) -> LiveSession | None:
    with _lock:
        return _sessions.get(session_id)


def workflow_id(extra_pnginfo: dict[str, Any] | None) -> str | None:
    """The id of the workflow that a page has queued, from what it sends along."""
    workflow = (extra_pnginfo or {}).get("workflow")
    found = workflow.get("id") if isinstance(workflow, dict) else None
    return found if isinstance(found, str) else None


@contextmanager
def on_air(file: LiveFile, watched: Watched, steering: Steering) -> Iterator[LiveSession]:
    """Let pages find the file until it has ended, and a while longer."""
    session = LiveSession(file, watched, steering)
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
