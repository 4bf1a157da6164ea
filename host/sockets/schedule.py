"""The schedule on HELIOS_SCHEDULE sockets."""

from __future__ import annotations

from typing import Any

from ...helios_core.schedule import Schedule


def check_schedule(schedule: Any) -> Schedule:
    """Raise ValueError for what is no schedule of Helios."""
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"`schedule` got a value of the type {type(schedule).__name__}; expected a schedule of Helios. Connect "
            "Helios Base Schedule, Helios Pyramid Schedule, Helios Distilled Schedule, or the loader's own."
        )
    return schedule
