"""In ComfyUI's own page, Helios Stream Video plays its video while it is made."""

import json

import pytest

from harness.browser import open_page
from harness.small import ROOT, read_workflow

pytestmark = pytest.mark.browser
PICTURES = ROOT / "build/pictures"
CHUNKS = 6
VALUES = {
    "folder": "Helios-Tiny-Distilled",
    "positive": "A small red ball circles counterclockwise on a black background.",
    "negative": "",
    "width": 128,
    "height": 128,
    "frames": 33 * CHUNKS,
    "resume": False,
    "live": True,
}
SET_WIDGETS = """values => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (values[widget.name] !== undefined) widget.value = values[widget.name] }"""
# Queues the graph; window.seen gets the clock and the picture's red, each time they have changed, until the run ends.
WATCH = """() => {
    window.seen = []
    window.ended = null
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, () => { window.ended = kind }, {once: true})
    const canvas = document.createElement('canvas')
    canvas.width = canvas.height = 32
    const context = canvas.getContext('2d', {willReadFrequently: true})
    const look = () => {
        const video = document.querySelector('.helios-live video')
        if (video?.readyState >= 2 && video.currentTime !== window.seen.at(-1)?.clock) {
            context.drawImage(video, 0, 0, 32, 32)
            const {data} = context.getImageData(0, 0, 32, 32)
            const red = []
            for (let i = 0; i < 1024; i++) if (data[4 * i] > 120 && data[4 * i + 1] < 100) red.push([i % 32, i >> 5])
            const middle = axis => red.reduce((sum, point) => sum + point[axis], 0) / red.length
            window.seen.push({clock: video.currentTime, running: window.ended === null,
                              ranges: video.buffered.length, fed: video.currentSrc.startsWith('blob:'),
                              red: red.length, x: red.length ? middle(0) : null, y: red.length ? middle(1) : null})
        }
        setTimeout(look, 50)
    }
    look()
    app.queuePrompt(0)
}"""
FINISHED = """seconds => { const video = document.querySelector('.helios-live video')
    return !video.currentSrc.includes('from=') && !video.currentSrc.startsWith('blob:')
        && Math.abs(video.duration - seconds) < 0.1 }"""
ENTER_SUBGRAPH = """() => { const node = app.graph.nodes.find(node => node.type === 'HeliosStreamVideo')
    const made = app.graph.convertToSubgraph(new Set([node]))
    app.canvas.openSubgraph(made.subgraph, made.node) }"""
VIDEO = """() => { const video = document.querySelector('.helios-live video')
    return JSON.stringify(video && {clock: video.currentTime, duration: video.duration, source: video.currentSrc,
        error: video.error?.message ?? null, words: document.querySelector('.helios-live [role=status]').textContent,
        line: document.querySelector('.helios-live').innerText}) }"""

# An answer of the server that comes when the player has gone on to another video.
ASK = """async answer => {
    const { Steering } = await import('/extensions/ComfyUI-Helios/helios_steer.js')
    const { api } = await import('/scripts/api.js')
    const session = id => ({ id, state: 'running', steering: { prompts: true, applied: [] } })
    const steering = new Steering()
    steering.show(session('first'))
    const original = api.fetchApi
    api.fetchApi = async () => { steering.show(session('second')); return new Response('{}', answer) }
    try { await steering.ask({ finish: true }) } finally { api.fetchApi = original }
    return [steering.answer, steering.state.textContent, steering.session.steering.applied]
}"""


def video(page):
    return json.loads(page.page.evaluate(VIDEO))


def start(page, seed):
    page.load(read_workflow("helios_stream"))
    page.page.evaluate(SET_WIDGETS, {**VALUES, "seed": seed})
    page.page.evaluate(WATCH)
    page.page.wait_for_function("window.seen.length > 20 || window.ended", timeout=120_000)


@pytest.mark.parametrize("policy", [True, False])
def test_the_ball_moves_before_the_run_has_ended_and_the_file_is_there_after_it(browser, server, policy):
    """With the content policy of --disable-api-nodes the growing file is a plain source; without, MediaSource's."""
    with open_page(browser, server.url, bypass_csp=not policy) as page:
        start(page, 42 + policy)
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=PICTURES / f"live_{'plain' if policy else 'fed'}.png")
        assert video(page)["source"].startswith("http" if policy else "blob:")
        page.page.wait_for_function("window.ended", timeout=180_000)
        during = [look for look in json.loads(page.page.evaluate("JSON.stringify(window.seen)")) if look["running"]]
        clocks = [look["clock"] for look in during]
        assert max(clocks) - min(clocks) > 1
        assert max(look["red"] for look in during) > 20
        places = [look["x"] for look in during if look["x"] is not None]
        assert max(places) - min(places) > 6  # of 32
        assert {look["ranges"] for look in during if look["fed"]} <= {1}  # no hole; of a plain file the browser guesses
        page.page.wait_for_function(FINISHED, arg=33 * CHUNKS / 24, timeout=60_000)
        assert page.errors == []


def test_it_goes_on_after_a_reload_and_in_a_second_tab(page, browser, server):
    start(page, 43)
    assert not page.page.evaluate("window.ended")
    workflow = page.page.evaluate("app.graph.serialize()")
    with open_page(browser, server.url) as second:
        for tab in (page, second):
            tab.open()
            tab.load(workflow)
        for tab in (page, second):
            tab.page.wait_for_selector(".helios-live video", timeout=30_000, state="attached")
            tab.page.wait_for_function("document.querySelector('.helios-live video').readyState >= 2", timeout=60_000)
        assert video(second)["error"] is None
    page.page.wait_for_function(
        "document.querySelector('.helios-live [role=status]').textContent === 'Finished'", timeout=180_000
    )
    assert page.errors == []


def test_it_plays_in_a_subgraph_too_and_speaks_chinese(browser, server):
    with open_page(browser, server.url) as page:
        page.page.evaluate("async () => { await app.extensionManager.setting.set('Comfy.Locale', 'zh') }")
        try:
            page.open()  # with another language the page makes its graph anew
            page.load(read_workflow("helios_stream"))
            page.page.evaluate(SET_WIDGETS, {**VALUES, "seed": 44, "frames": 66})
            page.page.evaluate(ENTER_SUBGRAPH)
            page.page.evaluate(WATCH)
            page.page.wait_for_function("window.seen.length > 10", timeout=120_000)
            page.page.screenshot(path=PICTURES / "live_subgraph.png")
            page.page.wait_for_function(
                "document.querySelector('.helios-live [role=status]').textContent === '已完成'", timeout=60_000
            )
        finally:
            page.page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
        assert page.errors == []


@pytest.mark.parametrize("status", [200, 429])
def test_what_is_answered_about_another_video_is_not_said_of_this_one(page, status):
    assert page.page.evaluate(ASK, {"status": status}) == [None, "", []]
