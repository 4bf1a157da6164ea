"""What `live` costs Helios Stream Video, in a real server on tiny random weights: CPU seconds a chunk, and the wait.

Pairs of the same run, with live and without, in turns: the server's own CPU time over the chunks, whatever else the
machine does. And of the live runs, the time from "run" to the first bytes of a picture, and to the first chunk.
`python benchmarks/live.py`, or `rows()`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import psutil  # type: ignore[import-untyped]
from measure import Row, table

from harness.client import run_workflow
from harness.host import Host
from harness.models import make_tiny_models
from harness.small import find, small_api
from helios_core.config import CHUNK_FRAMES

WIDTH, HEIGHT, CHUNKS, PAIRS = 448, 256, 6, 5
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
LIST = "/helios/live"


def cpu_seconds(host: Host) -> float:
    assert host.process is not None
    times = psutil.Process(host.process.pid).cpu_times()
    return float(times.user + times.system)


def run(host: Host, api: dict[str, Any], live: bool, seed: int) -> float:
    """CPU seconds a chunk."""
    inputs = api[find(api, "HeliosStreamVideo")]["inputs"]
    inputs |= {"live": live, "seed": seed, "resume": False}
    before = cpu_seconds(host)
    run_workflow(host.url, api, timeout=1800)
    return (cpu_seconds(host) - before) / CHUNKS


def waits(host: Host, api: dict[str, Any], seed: int) -> tuple[float, float]:
    """Seconds from "run" to the first bytes with a picture in them, and to the whole first chunk."""
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, host, api, True, seed)
        while not (found := [s for s in host.get(LIST)["sessions"] if s["state"] == "running"]):
            time.sleep(0.02)
        with urllib.request.urlopen(f"{host.url}{LIST}/{found[0]['id']}.mp4?from=start", timeout=600) as stream:
            stream.read(2000)
            first = time.monotonic() - begin
        while host.get(LIST)["sessions"][-1]["written"] < CHUNK_FRAMES:
            time.sleep(0.02)
        chunk = time.monotonic() - begin
        ended.result()
    return first, chunk


def rows() -> list[Row]:
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as base,
        Host(Path(base), models=make_tiny_models(Path(folder))) as host,
    ):
        size = {"width": WIDTH, "height": HEIGHT, "frames": CHUNK_FRAMES * CHUNKS}
        api = small_api("helios_stream", host.get("/object_info"), **size, **STEPS)
        run(host, api, live=False, seed=1000)  # loads
        pairs = [[run(host, api, live, seed) for live in (True, False)] for seed in range(PAIRS)]
        first, chunk = waits(host, api, 2000)
    ratios = sorted(live / plain for live, plain in pairs)
    live, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    note = f"{PAIRS} pairs of {CHUNKS} chunks at {WIDTH}x{HEIGHT}; live over without: " + ", ".join(
        f"{ratio:.3f}" for ratio in ratios
    )
    return [
        Row("live_cpu_seconds_a_chunk", live, plain, "s", statistics.median(ratios), note),
        Row("live_first_picture", first, None, "s", note='from "run", models loaded'),
        Row("live_first_chunk", chunk, None, "s", note='from "run", models loaded'),
    ]


if __name__ == "__main__":
    print(table(rows()))
