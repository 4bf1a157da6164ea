"""What pages ask of a run under way, and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ..sockets.prompt_changes import MOST_CHUNKS, Change

MOST_WAITING = 64
SHOWN = 8  # newest changes that pages are told


class TooMany(ValueError):
    """So much is waiting already that no more is taken."""


class Steering:
    """Pages ask from the server's thread, the run takes from its own."""

    def __init__(self, prompts: bool, endless: bool):
        """prompts: whether it can take any. endless: it goes on until somebody says that it is to finish."""
        self.prompts, self.endless = prompts, endless
        self.finishing = False
        self.refusal: str | None = None  # why the newest change did not take effect
        self._waiting: list[Change] = []
        self._applied: dict[int, Change] = {}
        self._lock = threading.Lock()

    def ask(self, change: Change) -> None:
        """For the next chunk that is not begun. Raises TooMany."""
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                raise TooMany(f"{MOST_WAITING} prompts are waiting for the next chunk already. Wait for it.")
            self._waiting.append(change)

    def finish(self) -> None:
        """With the chunk that is being made, or the least number of them."""
        self.finishing = True

    def take(self) -> Change | None:
        """The newest of what is waiting; nobody has seen the others."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            return waiting[-1] if waiting else None

    @property
    def is_asked(self) -> bool:
        return bool(self._waiting)

    def done(self, position: int, change: Change) -> None:
        """The change takes effect with chunk `position` of the run."""
        with self._lock:
            self._applied[position] = change
            self.refusal = None

    def forget_from(self, position: int) -> None:
        """The run has ended with chunk `position` not made, though it may have been begun."""
        with self._lock:
            self._applied = {before: change for before, change in self._applied.items() if before < position}

    @property
    def applied(self) -> Mapping[int, Change]:
        """By how many chunks of the run come before."""
        with self._lock:
            return dict(self._applied)

    def goes_on(self, index: int) -> bool:
        """Whether chunk `index` of the video is to be made, beyond the least number."""
        return self.endless and not self.finishing and index < MOST_CHUNKS

    def describe(self) -> dict[str, Any]:
        with self._lock:
            newest = list(self._applied.items())[-SHOWN:]
            return {
                "prompts": self.prompts,
                "endless": self.endless,
                "finishing": self.finishing,
                "waiting": len(self._waiting),
                "refusal": self.refusal,
                "applied": [{"after_chunk": position, **change.as_dict()} for position, change in newest],
            }
