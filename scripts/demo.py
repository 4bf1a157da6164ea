"""Make a video through a real ComfyUI server, as a person would: workflow in, mp4 out.

HELIOS_MODELS    a ComfyUI models folder (only read); unset: Helios-Tiny, which comes with the pack
HELIOS_WORKFLOW  the workflow, in UI or API format; unset: helios_first_run, or helios_t2v_distilled with HELIOS_MODELS
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
from PIL import Image, ImageOps

from harness.client import Event, Run, RunError, run_workflow
from harness.host import ROOT, Host, HostError
from harness.workflow import to_api

BUILD = ROOT / "build" / "demo"
VIDEOS = (".mp4", ".webm", ".mkv", ".mov")
TINY_THREADS = "1"  # in a network this small they wait for each other: on a busy machine most of the time
SHEET_COLUMNS, SHEET_ROWS = 6, 2
SHEET_TILE = 192  # pixels of the longer side
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


def read_workflow(own_models: bool) -> dict[str, Any]:
    default = ROOT / "workflows" / ("helios_t2v_distilled.json" if own_models else "helios_first_run.json")
    path = Path(os.environ.get("HELIOS_WORKFLOW") or default).expanduser()
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


def find_models() -> Path | None:
    given = os.environ.get("HELIOS_MODELS")
    if not given:
        print("weights: Helios-Tiny, a toy that knows coloured shapes; HELIOS_MODELS=<ComfyUI models folder> for yours")
        return None
    models = Path(given).expanduser()
    if not models.is_dir():
        raise DemoError(f"HELIOS_MODELS is {given!r}, which is no folder. Name ComfyUI's models folder.")
    print(f"weights: {models.resolve()}")
    return models


def describe(run: Run, host: Host) -> list[str]:
    """Two lines for each video of the run: its path with frames, rate and size, and the path of its contact sheet."""
    lines = []
    for file in run.files():
        path = host.output / file["subfolder"] / file["filename"]
        if file["type"] == "output" and path.suffix in VIDEOS:
            with av.open(str(path)) as container:
                video = container.streams.video[0]
                frames = sum(1 for _ in container.decode(video))
                rate = float(video.average_rate or 0)
                lines.append(f"video: {path} ({frames} frames, {rate:g} fps, {video.width}x{video.height})")
            lines.append(f"sheet: {save_contact_sheet(path, frames)}")
    if not lines:
        raise DemoError("The workflow ran, and saved no video. Add a Save Video node.")
    return lines


def save_contact_sheet(video: Path, frames: int) -> Path:
    """A PNG beside the video: some of its frames, evenly spread from the first to the last, row by row."""
    count = SHEET_COLUMNS * SHEET_ROWS
    wanted = [round(tile * (frames - 1) / (count - 1)) for tile in range(count)]
    with av.open(str(video)) as container:
        shown = {i: frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in wanted}
    tiles = [ImageOps.contain(shown[i], (SHEET_TILE, SHEET_TILE)) for i in wanted]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, SHEET_ROWS * height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % SHEET_COLUMNS * width, number // SHEET_COLUMNS * height))
    path = video.with_suffix(".png")
    sheet.save(path)
    return path


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit by exception, so that the server is stopped
    start = time.monotonic()
    try:
        models = find_models()
        workflow = read_workflow(own_models=models is not None)
        env = {} if models else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", TINY_THREADS)}
        host = Host(BUILD / "comfyui", models=models, cpu=not torch.accelerator.is_available(), env=env)
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
    print(f"{run.seconds:.1f} s for the run, {time.monotonic() - start:.1f} s with everything")
    print(*videos, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
