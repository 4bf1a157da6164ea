"""Make a video through a real ComfyUI server, as a person would: workflow in, mp4 out.

HELIOS_MODELS    a ComfyUI models folder with real weights (only read); unset: tiny random ones are made
HELIOS_WORKFLOW  the workflow, in UI or API format; unset: workflows/helios_t2v_distilled.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import av
import torch

from harness.client import Event, Run, RunError, run_workflow
from harness.host import ROOT, Host, HostError
from harness.models import make_tiny_models
from harness.workflow import to_api

BUILD = ROOT / "build" / "demo"
DEFAULT_WORKFLOW = ROOT / "workflows" / "helios_t2v_distilled.json"
VIDEOS = (".mp4", ".webm", ".mkv", ".mov")
DAY = 24 * 3600.0


class DemoError(RuntimeError):
    """What is wrong, in words for the person who typed `make demo`."""


class Terminal:
    """Shows a run as it goes: a line for each node, and its progress in that line where there is a terminal."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        self.workflow = workflow
        self.live = sys.stdout.isatty()
        self.shown = -1
        self.line = ""

    def __call__(self, event: Event) -> None:
        if event.kind == "executing" and event.data["node"]:
            self.finish_line()
            self.line, self.shown = self.workflow[event.data["node"]]["class_type"], -1
            print(f"{event.seconds:7.1f} s  {self.line}", end="" if self.live else "\n", flush=True)
        elif event.kind == "progress" and event.data["max"] > 0:
            percent = int(100 * event.data["value"] / event.data["max"])
            if self.live:
                print(f"\r{event.seconds:7.1f} s  {self.line} {percent:3d} %", end="", flush=True)
            elif percent // 10 > self.shown // 10:
                print(f"{event.seconds:7.1f} s    {percent:3d} %", flush=True)
                self.shown = percent

    def finish_line(self) -> None:
        if self.live and self.line:
            print()
        self.line = ""


def read_workflow() -> dict[str, Any]:
    path = Path(os.environ.get("HELIOS_WORKFLOW") or DEFAULT_WORKFLOW).expanduser()
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DemoError(f"The workflow {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DemoError(f"The workflow {path} is no JSON: {error}.") from None
    print(f"workflow: {path}")
    if isinstance(workflow, dict) and ("nodes" in workflow or is_api(workflow)):
        return workflow
    raise DemoError(f"{path} is a workflow in neither UI nor API format.")


def is_api(workflow: dict[str, Any]) -> bool:
    return all(isinstance(node, dict) and "class_type" in node for node in workflow.values())


def find_models() -> Path:
    given = os.environ.get("HELIOS_MODELS")
    if not given:
        print(
            "weights: tiny random ones, so expect colourful noise; HELIOS_MODELS=<ComfyUI models folder> for real ones"
        )
        return make_tiny_models(BUILD / "models")
    models = Path(given).expanduser()
    if not models.is_dir():
        raise DemoError(f"HELIOS_MODELS is {given!r}, which is no folder. Name ComfyUI's models folder.")
    print(f"weights: {models.resolve()}")
    return models


def describe(run: Run, host: Host) -> list[str]:
    """A line for each video of the run: path, frames, rate, size in pixels."""
    lines = []
    for file in run.files():
        path = host.output / file["subfolder"] / file["filename"]
        if file["type"] == "output" and path.suffix in VIDEOS:
            with av.open(str(path)) as container:
                video = container.streams.video[0]
                frames = sum(1 for _ in container.decode(video))
                rate = float(video.average_rate or 0)
                lines.append(f"{path}\n  {frames} frames, {rate:g} fps, {video.width}x{video.height}")
    if not lines:
        raise DemoError("The workflow ran, and saved no video. Add a Save Video node.")
    return lines


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit by exception, so that the server is stopped
    start = time.monotonic()
    try:
        workflow = read_workflow()
        host = Host(BUILD / "comfyui", models=find_models(), cpu=not torch.accelerator.is_available())
        print("ComfyUI is starting ...", flush=True)
        with host:
            print(f"ComfyUI {host.get('/system_stats')['system']['comfyui_version']} at {host.url}")
            if not is_api(workflow):
                workflow = to_api(workflow, host.get("/object_info"))
            terminal = Terminal(workflow)
            try:
                run = run_workflow(host.url, workflow, timeout=DAY, on_event=terminal)
            except RunError as error:
                terminal.finish_line()
                raise DemoError(f"{error}\n(log: {host.log})") from error
            terminal.finish_line()
            videos = describe(run, host)
    except (DemoError, HostError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(*videos, sep="\n")
    print(f"  {run.seconds:.1f} s for the run, {time.monotonic() - start:.1f} s with everything")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
