"""Work beside the node's own thread, one piece at a time."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import comfy.model_management
import torch


class Background:
    """A thread that ends with the `with` block. At most one piece of work is under way, so memory stays bounded."""

    def __init__(self) -> None:
        # On a card, kernels of two threads on one stream would take turns. With --cpu it is left alone.
        used = torch.cuda.is_available() and comfy.model_management.get_torch_device().type == "cuda"
        self._stream = torch.cuda.Stream() if used else None
        self._thread = ThreadPoolExecutor(1, "helios")
        self._work: Future[None] | None = None

    def start(self, work: Callable[..., None], *args: Any) -> None:
        """Run work(*args) on the thread, after what is under way. Raises what that has raised."""
        self.wait()
        # The host knows by the context which node is at work; inference mode is a thread's own.
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # what the work reads may still be on its way
        self._work = self._thread.submit(contextvars.copy_context().run, self._run, work, *args)

    def check(self) -> None:
        """Raise what the work has raised, once; returns at once where it is still under way."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is under way. Raises what the work has raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        with torch.inference_mode(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            work(*args)
            if self._stream is not None:
                self._stream.synchronize()
