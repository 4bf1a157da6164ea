"""A group of worker processes: started, asked, watched and ended."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy.cli_args import args
from torch import Tensor

from ..printable import printable_log
from .wire import Message, packed, receive

log = printable_log(__name__)

ENTRY = Path(__file__).with_name("entry.py")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # else they listen on all networks
WHILE_LOADING = 1800.0  # s, from a slow disk
LEAST_PATIENCE = 60.0
FIRST_PATIENCE = 600.0  # for a step before any is known
TIMES_SLOWEST = 10
LAST_LINES = 30  # of a log
TO_END = 5.0  # s, until a process that does not end is killed
ERROR = re.compile(r"(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")


class WorkerError(RuntimeError):
    """The group has ended; the next run starts another."""


@dataclass(frozen=True)
class Job:
    """What every worker of a group is told, beside its rank."""

    path: str  # of the checkpoint
    dtype: str
    offloading: Sequence[Any] | None  # the fields of an `Offloading`
    cards: Sequence[str | None]  # for each worker, as CUDA_VISIBLE_DEVICES names it; None for the CPU
    patience: float = 0.0  # s that a step may take; 0 for what the steps before it tell


class Workers:
    """The processes of a job, loaded and ready. Whatever goes wrong ends all of them, and raises WorkerError."""

    def __init__(self, job: Job, write_patches: Any = None):
        """write_patches(path) writes the model's LoRAs into a file; None where there are none."""
        self.job, self.degree = job, len(job.cards)
        self.slowest = 0.0
        self.numbers = 0
        self.forgotten: list[int] = []
        self.answers: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self.folder = tempfile.TemporaryDirectory(prefix="helios-workers-")
        self.processes: list[subprocess.Popen[bytes]] = []
        # By hand, when nobody has this object any more, or when the server ends: whichever is first.
        self.close = weakref.finalize(self, _end, self.processes, self.folder)
        try:
            self._start(write_patches)
            self._wait(WHILE_LOADING, heedless=0.0)
        except BaseException:
            self.close()
            raise
        log.info("Helios Multi-GPU: %d workers have loaded the model.", self.degree)

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.poll() is None for process in self.processes)

    @property
    def patience(self) -> float:
        """Seconds that a step may take."""
        if self.job.patience:
            return self.job.patience
        return max(LEAST_PATIENCE, TIMES_SLOWEST * self.slowest) if self.slowest else FIRST_PATIENCE

    def remember(self, owner: Any) -> int:
        """A number for what the workers are to keep as long as this object lives."""
        self.numbers += 1
        weakref.finalize(owner, self.forgotten.append, self.numbers)
        return self.numbers

    def ask(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the first worker answers, once all have. A header's "do" names what is asked, and "flow" is a step."""
        forgotten, self.forgotten[:] = self.forgotten[:], []
        message = packed({**header, "forget": forgotten}, tensors)
        began = time.monotonic()
        try:
            for process in self.processes:
                # One that hangs reads nothing, and the server must not hang with it.
                threading.Thread(target=_write, args=(process.stdin, message), daemon=True).start()
            answer = self._wait(self.patience)
        except BaseException:
            self.close()
            raise
        if header["do"] == "flow":
            self.slowest = max(self.slowest, time.monotonic() - began)
        return answer

    def _start(self, write_patches: Any) -> None:
        folder = Path(self.folder.name)
        patches = folder / "patches.safetensors"
        if write_patches is not None:
            write_patches(patches)
        job = {
            "path": self.job.path,
            "dtype": self.job.dtype,
            "offloading": self.job.offloading,
            "degree": self.degree,
            "folder": str(folder),
            "rendezvous": (folder / "rendezvous").as_uri(),
            "backend": "gloo" if self.job.cards[0] is None else "nccl",
            "patches": str(patches) if write_patches is not None else None,
        }
        for rank, card in enumerate(self.job.cards):
            environment = {**os.environ, **LOOPBACK}
            if card is not None:
                environment["CUDA_VISIBLE_DEVICES"] = card
            with open(folder / f"{rank}.log", "wb") as log_file:
                process = subprocess.Popen(
                    [sys.executable, str(ENTRY)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    bufsize=0,  # a buffer cannot be closed while another thread writes to it
                    env=environment,
                    start_new_session=True,  # an interrupt from the keyboard is for the server
                )
            self.processes.append(process)
            threading.Thread(target=_read, args=(rank, process.stdout, self.answers), daemon=True).start()
            settings = {"comfyui": comfyui_path(), "arguments": arguments(), "job": {**job, "rank": rank}}
            _write(process.stdin, json.dumps(settings).encode() + b"\n")

    def _wait(self, limit: float, heedless: float = LEAST_PATIENCE) -> dict[str, Tensor]:
        """For an answer of each worker. An interrupt counts after this many seconds: it ends the workers, and a step
        in its usual time is better waited for."""
        began = time.monotonic()
        waiting = set(range(self.degree))
        first: dict[str, Tensor] = {}
        while waiting:
            if time.monotonic() - began >= heedless:
                comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                rank, message = self.answers.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() - began > limit:
                    raise WorkerError(self._hung(waiting, limit)) from None
                continue
            if message is None:
                raise WorkerError(self._died(rank))
            waiting.discard(rank)
            if rank == 0:
                first = message[1]
        return first

    def _hung(self, waiting: set[int], limit: float) -> str:
        names = ", ".join(self._name(rank) for rank in sorted(waiting))
        return (
            f"Helios Multi-GPU: {names} did not answer within {limit:.0f} s, and all were ended. The next run starts "
            "them again. If a step does take as long, set timeout to more."
        )

    def _died(self, rank: int) -> str:
        process = self.processes[rank]
        try:
            code = process.wait(TO_END)
        except subprocess.TimeoutExpired:
            code = 0
        text = (Path(self.folder.name) / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        log.error("Helios Multi-GPU: the log of %s ends in\n%s", self._name(rank), "\n".join(lines[-LAST_LINES:]))
        said = last_error(lines)
        if code < 0:
            said = f"it was killed ({signal.Signals(-code).name})"
        return (
            f"Helios Multi-GPU: {self._name(rank)} has ended: {said}. The next run starts all of them again; a stream "
            "with resume goes on from the last chunk."
        )

    def _name(self, rank: int) -> str:
        card = self.job.cards[rank]
        return f"worker {rank + 1} of {self.degree}" + (f" (card {card})" if card is not None else "")


def _end(processes: list[subprocess.Popen[bytes]], folder: tempfile.TemporaryDirectory[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # which they take for their end
    deadline = time.monotonic() + TO_END
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    processes.clear()
    folder.cleanup()


def comfyui_path() -> str:
    """The folder that ComfyUI was imported from."""
    return str(Path(comfy.model_management.__file__).resolve().parents[1])


def arguments() -> dict[str, Any]:
    """The server's command line, as far as it can be written down: attention, precision, memory."""
    return {name: x for name, x in vars(args).items() if x is None or isinstance(x, (bool, int, float, str))}


def last_error(lines: Sequence[str]) -> str:
    """The last line of a log that names an error, or the very last."""
    errors = [found[1] for found in map(ERROR.fullmatch, lines) if found]
    said = (errors or lines or ["it said nothing"])[-1]
    return said.strip().rstrip(".")


def _write(stream: Any, message: bytes) -> None:
    rest = memoryview(message)
    with suppress(OSError, ValueError):  # the worker has ended, and whoever waits for its answer says so
        while rest:
            rest = rest[stream.write(rest) :]


def _read(rank: int, pipe: Any, answers: queue.SimpleQueue[tuple[int, Message | None]]) -> None:
    with io.BufferedReader(pipe) as stream:
        while (message := receive(stream)) is not None:
            answers.put((rank, message))
    answers.put((rank, None))
