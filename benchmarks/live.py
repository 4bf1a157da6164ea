"""What `live` costs Helios Stream Video, in a real server on tiny random weights: CPU seconds a chunk, and the wait.

Pairs of the same run, with live and without, in turns: the server's own CPU time over the chunks, whatever else the
machine does. And in ComfyUI's page, where there is a Chromium, the time from "run" to the first picture on the screen,
and to the first chunk.
`python benchmarks/live.py`, or `rows()`.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import psutil  # type: ignore[import-untyped]
from measure import Row, table

from harness.browser import chromium, find_chromium, open_page
from harness.client import run_workflow
from harness.host import Host
from harness.models import make_tiny_models
from harness.small import find, small_api
from helios_core.config import CHUNK_FRAMES

WIDTH, HEIGHT, CHUNKS, PAIRS = 448, 256, 6, 5
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
# Queues the graph that is shown: seconds until a picture that is not all one colour is on the screen, and until the
# server has the first chunk.
WAIT = """chunk => new Promise(resolve => {
    const begin = performance.now(), found = {}
    const context = Object.assign(document.createElement('canvas'), {width: 32, height: 32}).getContext('2d')
    const note = name => { found[name] ??= (performance.now() - begin) / 1000
        if (found.frame && found.chunk && found.end) resolve(found) }
    const video = document.querySelector('.helios-live video')
    const shown = () => {
        context.drawImage(video, 0, 0, 32, 32)
        const values = context.getImageData(0, 0, 32, 32).data.filter((_, i) => i % 4 < 3)
        if (Math.max(...values) - Math.min(...values) > 8) note('frame')
        else video.requestVideoFrameCallback(shown)
    }
    video.requestVideoFrameCallback(shown)
    const ask = async () => {
        const {sessions} = await (await app.api.fetchApi('/helios/live')).json()
        if (sessions.some(({state, written}) => state === 'running' && written >= chunk)) note('chunk')
        else setTimeout(ask, 20)
    }
    ask()
    app.api.addEventListener('execution_success', () => note('end'), {once: true})
    app.queuePrompt(0).catch(() => {})
})"""


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


def waits(host: Host, api: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds from "run" to the first frame on the screen of a page, and to the whole first chunk, of each run."""
    inputs = api[find(api, "HeliosStreamVideo")]["inputs"]
    found = []
    with chromium() as browser:
        for turn in range(PAIRS):
            inputs |= {"live": True, "seed": 2000 + turn, "resume": False}
            with open_page(browser, host.url) as page:
                page.load_api(api)
                found.append(page.page.evaluate(WAIT, CHUNK_FRAMES))
    return found


def rows() -> list[Row]:
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as base,
        Host(Path(base), models=make_tiny_models(Path(folder)), api_nodes=True) as host,
    ):
        size = {"width": WIDTH, "height": HEIGHT, "frames": CHUNK_FRAMES * CHUNKS}
        api = small_api("helios_stream", host.get("/object_info"), **size, **STEPS)
        run(host, api, live=False, seed=1000)  # loads
        pairs = [[run(host, api, live, seed) for live in (True, False)] for seed in range(PAIRS)]
        waited = waits(host, api) if find_chromium() else []
    ratios = sorted(live / plain for live, plain in pairs)
    live, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    note = f"{PAIRS} pairs of {CHUNKS} chunks at {WIDTH}x{HEIGHT}; live over without: " + ", ".join(
        f"{ratio:.3f}" for ratio in ratios
    )
    return [
        Row("live_cpu_seconds_a_chunk", live, plain, "s", statistics.median(ratios), note),
        *(_wait(name, [seconds[name] for seconds in waited]) for name in ("frame", "chunk") if waited),
    ]


def _wait(name: str, seconds: list[float]) -> Row:
    note = 'from "run" in the page, models loaded: ' + ", ".join(f"{value:.2f}" for value in sorted(seconds))
    return Row(f"live_first_{name}", statistics.median(seconds), None, "s", note=note)


if __name__ == "__main__":
    print(table(rows()))
