"""Run an API-format workflow on a ComfyUI server, and keep all that it says on the way."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")
Workflow = dict[str, Any]
# Binary websocket messages: event 1 is a preview image, then its format (1 JPEG, 2 PNG), then the file's bytes.
PREVIEW_EVENT = 1
PREVIEW_FORMATS = {1: "jpeg", 2: "png"}


@dataclass(frozen=True)
class Event:
    """A message of the server. seconds: since the workflow was handed over."""

    seconds: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    seconds: float
    node: str
    value: float
    maximum: float


@dataclass(frozen=True)
class Preview:
    seconds: float
    format: str  # jpeg or png
    image: bytes


@dataclass
class Run:
    """One run of a workflow, as far as it came."""

    prompt_id: str = ""
    seconds: float = 0.0
    outputs: dict[str, Any] = field(default_factory=dict)  # by node id, as the server's history has them
    events: list[Event] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)

    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order; cached ones are not among them."""
        return [event.data["node"] for event in self.events if event.kind == "executing" and event.data["node"]]

    def files(self) -> list[dict[str, str]]:
        """What was saved: {"filename", "subfolder", "type"} each."""
        lists = [
            entries for output in self.outputs.values() for entries in output.values() if isinstance(entries, list)
        ]
        return [entry for entries in lists for entry in entries if isinstance(entry, dict) and "filename" in entry]


class RunError(RuntimeError):
    """A workflow that did not finish. run: what had come until then; details: the server's own answer."""

    def __init__(self, message: str, run: Run, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.run = run
        self.details = details


class PromptRejected(RunError):
    """The server's validation refused the workflow; nothing ran."""


class ExecutionFailed(RunError):
    """A node raised."""


class ExecutionInterrupted(RunError):
    """Somebody interrupted the run."""


def run_workflow(
    url: str, workflow: Workflow, *, timeout: float = 120, on_event: Callable[[Event], None] | None = None
) -> Run:
    """Run an API-format workflow to its end. Raises a RunError, or TimeoutError after `timeout` seconds.

    on_event is called with every text message of this run, while it runs.
    """
    return _in_own_thread(_run(url, workflow, timeout, on_event or (lambda event: None)))


def _in_own_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    """Playwright's sync API keeps an event loop going in the tests' thread, where asyncio then starts no other."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


async def _run(url: str, workflow: Workflow, timeout: float, on_event: Callable[[Event], None]) -> Run:
    run, client_id = Run(), uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        # Connected before the workflow is queued: messages to an absent client are lost.
        session.ws_connect(f"{url}/ws?clientId={client_id}", max_msg_size=0) as socket,
    ):
        start = time.monotonic()
        async with session.post(f"{url}/prompt", json={"prompt": workflow, "client_id": client_id}) as response:
            answer = json.loads(await response.text())
            if response.status != 200:
                raise PromptRejected(_rejection(answer, workflow), run, answer)
        run.prompt_id = answer["prompt_id"]
        try:
            await asyncio.wait_for(_follow(socket, run, start, on_event), timeout)
        finally:
            run.seconds = time.monotonic() - start
        async with session.get(f"{url}/history/{run.prompt_id}") as response:
            run.outputs = (await response.json())[run.prompt_id]["outputs"]
    return run


async def _follow(
    socket: aiohttp.ClientWebSocketResponse, run: Run, start: float, on_event: Callable[[Event], None]
) -> None:
    async for message in socket:
        seconds = time.monotonic() - start
        if message.type == aiohttp.WSMsgType.BINARY:
            if int.from_bytes(message.data[:4], "big") == PREVIEW_EVENT:
                kind = PREVIEW_FORMATS[int.from_bytes(message.data[4:8], "big")]
                run.previews.append(Preview(seconds, kind, message.data[8:]))
            continue
        content = json.loads(message.data)
        event = Event(seconds, content["type"], content["data"])
        if event.data.get("prompt_id", run.prompt_id) != run.prompt_id:
            continue
        run.events.append(event)
        if event.kind == "progress":
            run.progress.append(Progress(seconds, str(event.data["node"]), event.data["value"], event.data["max"]))
        on_event(event)
        if event.kind == "execution_error":
            where = f"node {event.data['node_id']} ({event.data['node_type']})"
            raise ExecutionFailed(f"{where}: {event.data['exception_message'].strip()}", run, event.data)
        if event.kind == "execution_interrupted":
            raise ExecutionInterrupted(f"interrupted in node {event.data['node_id']}", run, event.data)
        # Sent after the task is done: the history is complete then, which it is not at execution_success.
        if event.kind == "executing" and event.data["node"] is None:
            return
    raise ExecutionFailed("the server closed the connection; see its log", run, {})


def _rejection(answer: dict[str, Any], workflow: Workflow) -> str:
    """The reasons of a refused workflow, one a line."""
    lines = []
    for node_id, node in (answer.get("node_errors") or {}).items():
        name = workflow.get(node_id, {}).get("class_type", "unknown")
        lines += [f"node {node_id} ({name}): {e['message']}: {e['details']}" for e in node["errors"]]
    error = answer.get("error", {})
    return "\n".join(lines) or f"{error.get('message', 'refused')}: {error.get('details', answer)}"
