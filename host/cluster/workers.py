"""A group of worker processes: started, asked, watched and ended."""

from __future__ import annotations

import queue
import signal
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy.cli_args import args
from torch import Tensor

from ...helios_core.quoting import known_by_its_name
from ..out_of_memory import CURE, RAN_OUT, ran_out
from ..printable import printable_log
from .local import LocalProcesses
from .patches import KEPT_FILES, keep_files, write_patches
from .processes import Answers, Ended, Processes, last_error
from .ray_cluster import RayProcesses
from .version import VERSION
from .wire import packed

log = printable_log(__name__)

WHILE_LOADING = 1800.0  # s, from a slow disk
LEAST_PATIENCE = 60.0
FIRST_PATIENCE = 600.0  # for a step before any is known
TIMES_SLOWEST = 10
LAST_LINES = 30  # of a log
AGAIN = "The next run starts all of them again; a stream with resume goes on from the last chunk."
CLOSED = (
    "Helios Multi-GPU: the workers were ended while they were at work, for something else that needs their cards. "
    f"{AGAIN}"
)


@known_by_its_name
class WorkerError(RuntimeError):
    """The group has ended; the next run starts another."""


@dataclass(frozen=True)
class Job:
    """What every worker of a group is told, beside its rank."""

    path: str  # of the checkpoint
    dtype: str
    offloading: Sequence[Any] | None  # the fields of an `Offloading`
    cards: Sequence[str | None]  # for each worker, as CUDA_VISIBLE_DEVICES names it; None for the CPU
    # s that a step may take, 0 for what the steps before it tell: another one is for the same workers
    patience: float = field(default=0.0, compare=False)
    address: str = ""  # of a Ray cluster, which then says what card each worker has; empty for this machine


class Workers:
    """The processes of a job, loaded and ready. Whatever goes wrong ends all of them, and raises WorkerError."""

    def __init__(self, job: Job, patches: Mapping[str, Any], memory: float = 0.0):
        """patches, memory: see `load`."""
        self.job, self.degree = job, len(job.cards)
        self.slowest = 0.0
        self.numbers = 0
        self.forgotten: list[int] = []
        self.files: list[str] = []  # of patches, which every machine has; the last used is the last
        self.answers: Answers = queue.SimpleQueue()
        self.folder = tempfile.TemporaryDirectory(prefix="helios-workers-")
        try:
            self.group = self._start()
        except BaseException:
            self.folder.cleanup()
            raise
        # By hand, when nobody has this object any more, or when the server ends: whichever is first.
        self.close = weakref.finalize(self, _end, self.group, self.folder)
        self._wait_or_close(WHILE_LOADING, heedless=0.0)
        self.load(patches, memory)
        log.info("Helios Multi-GPU: %d workers have loaded the model.", self.degree)

    @property
    def alive(self) -> bool:
        return self.close.alive and self.group.alive

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

    def load(self, patches: Mapping[str, Any], memory: float) -> None:
        """Load the model, or load it again, with these LoRA patches. memory: bytes that a step takes beside weights."""
        file, encoded = write_patches(Path(self.folder.name), patches)
        if file is not None:
            if file.name in self.files:
                self.files.remove(file.name)
            else:
                self.group.share(file)
            self.files = [*self.files, file.name][-KEPT_FILES:]
        header = {
            "do": "load",
            "patches": encoded,
            "file": None if file is None else file.name,
            "keep": self.files,
            "memory": memory,
        }
        self._ask(header, {}, WHILE_LOADING, heedless=0.0)
        keep_files(Path(self.folder.name), self.files)  # theirs may be elsewhere

    def ask(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the first worker answers, once all have. A header's "do" names what is asked, and "flow" is a step."""
        began = time.monotonic()
        answer = self._ask(header, tensors, self.patience)
        if header["do"] == "flow":
            self.slowest = max(self.slowest, time.monotonic() - began)
        return answer

    def _ask(
        self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], limit: float, heedless: float = LEAST_PATIENCE
    ) -> dict[str, Tensor]:
        if not self.close.alive:
            raise WorkerError(CLOSED)
        forgotten = [self.forgotten.pop() for _ in range(len(self.forgotten))]
        self.group.send(packed({**header, "forget": forgotten}, tensors))
        return self._wait_or_close(limit, heedless)

    def _wait_or_close(self, limit: float, heedless: float) -> dict[str, Tensor]:
        try:
            return self._wait(limit, heedless)
        except BaseException:
            self.close()
            raise

    def _start(self) -> Processes:
        job = {
            "path": self.job.path,
            "dtype": self.job.dtype,
            "offloading": self.job.offloading,
            "degree": self.degree,
            "backend": "gloo" if self.job.cards[0] is None else "nccl",
        }
        settings = {"comfyui": comfyui_path(), "arguments": arguments(), "version": VERSION, "job": job}
        folder = Path(self.folder.name)
        if self.job.address:
            return RayProcesses(self.job.address, self.job.cards, settings, folder, self.answers)
        return LocalProcesses(self.job.cards, settings, folder, self.answers)

    def _wait(self, limit: float, heedless: float) -> dict[str, Tensor]:
        """For an answer of each worker. An interrupt counts after this many seconds: it ends the workers, and a step
        in its usual time is better waited for."""
        began = time.monotonic()
        waiting = set(range(self.degree))
        first: dict[str, Tensor] = {}
        while waiting:
            if time.monotonic() - began >= heedless:
                comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                rank, answer = self.answers.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() - began > limit:
                    raise WorkerError(self._hung(waiting, limit)) from None
                continue
            if isinstance(answer, Ended):
                raise self._died(rank, answer) if self.close.alive else WorkerError(CLOSED)
            waiting.discard(rank)
            if rank == 0:
                first = answer[1]
        return first

    def _hung(self, waiting: set[int], limit: float) -> str:
        names = ", ".join(self._name(rank) for rank in sorted(waiting))
        return (
            f"Helios Multi-GPU: {names} did not answer within {limit:.0f} s, and all were ended. The next run starts "
            "them again. If a step does take as long, set timeout to more."
        )

    def _died(self, rank: int | None, how: Ended) -> RuntimeError:
        if rank is None:
            return WorkerError(f"Helios Multi-GPU: {how.log}")
        lines = [line for line in how.log.splitlines() if line.strip()]
        name, end = f"Helios Multi-GPU: {self._name(rank)}", "\n".join(lines[-LAST_LINES:])
        log.error("Helios Multi-GPU: the log of %s ends in\n%s", self._name(rank), end)
        if RAN_OUT.search(end):
            return ran_out(name, end, f"{CURE} {AGAIN}")
        said = last_error(lines)
        if how.code is not None and how.code < 0:
            killed_by = signal.Signals(-how.code).name
            said = f"it was killed ({killed_by})"
            if killed_by == "SIGKILL":  # which Python knows by number only where it is
                said += ", as Linux does where the computer's memory runs out"
        return WorkerError(f"{name} has ended: {said}. {AGAIN}")

    def _name(self, rank: int) -> str:
        where = self.group.where(rank)
        return f"worker {rank + 1} of {self.degree}" + (f" ({where})" if where else "")


def _end(group: Processes, folder: tempfile.TemporaryDirectory[str]) -> None:
    group.end()
    folder.cleanup()


def comfyui_path() -> str:
    """The folder that ComfyUI was imported from."""
    return str(Path(comfy.model_management.__file__).resolve().parents[1])


def arguments() -> dict[str, Any]:
    """The server's command line, as far as it can be written down: attention, precision, memory."""
    known = {name: x for name, x in vars(args).items() if x is None or isinstance(x, (bool, int, float, str))}
    return known | {"fast": [feature.value for feature in args.fast]}
