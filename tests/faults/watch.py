"""Watches the child that runs the cases: for hangs, for memory out of proportion, and for its death."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.host import DIE_WITH_PARENT

TESTS = Path(__file__).resolve().parents[1]
MEMORY = 700 * 2**20  # bytes that a case may take beyond what was there before it
HANG = 10.0  # seconds, on a machine at rest
SLOW = 20.0  # times as long as a good graph takes, on any other
START = 240.0  # seconds that the child has to load the host
ENOUGH = 50  # faults, to look at first
POLL = 0.02  # seconds between two looks at its memory


@dataclass
class Report:
    """What was found, by the number of the case."""

    cases: int = 0
    faults: dict[int, str] = field(default_factory=dict)


def fuzz(
    good: Path,
    seed: str,
    seconds: float,
    *,
    first: int = 0,
    last: float = math.inf,
    family: str | None = None,
    planted: bool = False,
    hang: float = HANG,
) -> Report:
    """Run cases for so many seconds, loading not counted; a child that hangs, hoards or dies is followed by another."""
    report = Report()
    end = math.inf
    while time.monotonic() < end and first <= last and len(report.faults) < ENOUGH:
        child = _Child(good, seed, first, family, planted)
        try:
            # A machine that is busy with other things is no fault of ours.
            limit = max(hang, SLOW * child.next(START)["good graph"])
            end = min(end, time.monotonic() + seconds)
            while time.monotonic() < end and first <= last and len(report.faults) < ENOUGH:
                number = child.next(limit)["begin"]
                first = number + 1
                report.cases += 1
                if wrong := child.next(limit)["wrong"]:
                    report.faults[number] = f"{child.does}: {wrong}"
        except _Trouble as trouble:
            if child.at is None:
                raise RuntimeError(f"The child did not start: {trouble}\n{child.log()}") from None
            report.faults[child.at] = f"{child.does}: {trouble}\n{child.log()}"
        finally:
            child.stop()
    return report


class _Trouble(Exception):
    """A hang, a hoard or a death."""


class _Child:
    def __init__(self, good: Path, seed: str, first: int, family: str | None, planted: bool):
        self.at: int | None = None  # the case that runs
        self.does = ""  # what it does
        self.before = 0  # bytes, at its beginning
        self.files = tempfile.TemporaryDirectory(prefix="helios-faults-")
        self.errors = (Path(self.files.name) / "log").open("w+b")
        command = [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), "-m", "faults.child", str(good)]
        command += ["--seed", seed, "--first", str(first)]
        command += ["--planted"] * planted + (["--family", family] if family else [])
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "scripts")]),
            "TMPDIR": self.files.name,
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors
        )
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(b"")

    def next(self, limit: float) -> dict[str, Any]:
        """What the child says next. Raises _Trouble where it hangs, hoards or dies."""
        deadline = time.monotonic() + limit
        while True:
            try:
                line = self.lines.get(timeout=POLL)
                break
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise _Trouble(f"hangs for more than {limit:.0f} s") from None
                taken = self._memory() - self.before
                if self.at is not None and taken > MEMORY:
                    raise _Trouble(f"takes {taken / 2**20:.0f} MiB") from None
        if not line:
            raise _Trouble(f"the process ends with {self.process.wait()}")
        said: dict[str, Any] = json.loads(line)
        if "does" in said:
            self.does += f"{said['does']}; "
            return self.next(limit)
        if "begin" in said:
            self.at, self.does, self.before = said["begin"], "", self._memory()
        return said

    def _memory(self) -> int:
        """Its own pages, without mapped files; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-1500:]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.files.cleanup()
