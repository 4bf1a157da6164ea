"""Measuring: two ways of doing one thing in turns, the memory it takes, and where it was done."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("helios_core", "benchmarks", "tests/gpu")  # the code that numbers are of
ATTEMPTS = 100

Compare = Callable[[Callable[[], Any], Callable[[], Any]], tuple[float, float]]
"""Median seconds of ours and of the peer: `in_turns`, its turns given."""


@dataclass(frozen=True)
class Row:
    """One comparison; ratio = peer / ours, so more than 1 is better than the peer. None where it was not measured."""

    name: str
    ours: float | None
    peer: float | None
    unit: str
    ratio: float | None = None
    note: str = ""

    @classmethod
    def compare(cls, name: str, ours: float, peer: float, unit: str, note: str = "") -> Row:
        return cls(name, ours, peer, unit, peer / ours, note)

    @classmethod
    def open(cls, name: str, why: str) -> Row:
        """What was not measured, and why."""
        return cls(name, None, None, "", note=why)


def seconds(function: Callable[[], Any], quiet: bool = False) -> float:
    """How long it takes; with quiet, again and again until no other process took more than 5 % of a core meanwhile."""
    for _ in range(ATTEMPTS if quiet else 1):
        synchronize()
        start, busy = time.perf_counter(), others_busy()
        function()
        synchronize()
        took = time.perf_counter() - start
        if not quiet or others_busy() - busy <= 0.05 * took + 0.02:
            break
        time.sleep(1)
    else:
        raise RuntimeError(f"This machine was not quiet for {took:.1f} s at a time in {ATTEMPTS} attempts.")
    return took


def others_busy() -> float:
    """CPU seconds that other processes have taken so far, by Linux' counters; 0 elsewhere."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = (int(ticks) for ticks in stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(ours: Callable[[], Any], peer: Callable[[], Any], turns: int, quiet: bool = False) -> tuple[float, float]:
    """Median seconds of each, A B A B: what else the machine does falls on both. Both have to be warm."""
    times = [(seconds(ours, quiet), seconds(peer, quiet)) for _ in range(turns)]
    mine, theirs = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(theirs)


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once beyond what was there before, as torch's allocator counts them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            function()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Peak:
    """The largest RssAnon of a process (this one) while the context lasts, over its value at the start; sampled."""

    def __init__(self, process: int | str = "self"):
        self.status = Path(f"/proc/{process}/status")

    def now(self) -> int:
        for line in self.status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise OSError(f"{self.status} has no RssAnon: this benchmark needs Linux.")

    def __enter__(self) -> Peak:
        self.start = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, self.now())

    @property
    def bytes(self) -> int:
        return self.peak - self.start


def machine() -> dict[str, Any]:
    """Where, with what and of which code the numbers were made. Leaves the GPU alone where nvidia-smi knows it."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "diffusers", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu, driver = _card()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": driver,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
        or os.environ.get("COMMIT"),
        "code": digest(*MEASURED),
    }


def _card() -> tuple[str | None, str | None]:
    """Name and driver of the GPU that torch uses."""
    if not torch.cuda.is_available():
        return None, None
    said = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if said is None:
        return torch.cuda.get_device_name(), None
    name, _, driver = said.partition("\n")[0].rpartition(", ")
    return name, driver


def _output(*command: str) -> str | None:
    """What a command says; None where there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def digest(*folders: str) -> str:
    """Of the measured code: a copy may have no commit, and a commit may have changes on top."""
    code = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        code.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return code.hexdigest()[:12]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[Row]) -> str:
    head = f"{'':24} {'ours':>10} {'peer':>10} {'ratio':>7}  unit"
    lines = [head, "-" * len(head)]
    for row in rows:
        ours, peer = (f"{x:10.4g}" if x is not None else f"{'open':>10}" for x in (row.ours, row.peer))
        ratio = f"{row.ratio:7.3f}" if row.ratio is not None else f"{'':7}"
        lines.append(f"{row.name:24} {ours} {peer} {ratio}  {row.unit}{'  ' + row.note if row.note else ''}")
    return "\n".join(lines)


def write(path: Path, rows: list[Row], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), **more, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
