"""In ComfyUI's own page, Helios Stream Video plays its video while it is made."""

import re

import pytest

from harness.browser import open_page
from harness.small import ROOT, read_workflow

pytestmark = pytest.mark.browser
PICTURES = ROOT / "build/pictures"
VALUES = {
    "folder": "Helios-Tiny-Distilled",
    "positive": "A small red ball circles counterclockwise on a black background.",
    "negative": "",
    "width": 128,
    "height": 128,
    "frames": 33,
    "resume": False,
    "live": True,
    "until_finished": True,  # each test says when it has seen enough
}
SET_WIDGETS = """values => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (values[widget.name] !== undefined) widget.value = values[widget.name] }"""
# Of a node that has never run, when it has been drawn: above what it takes without a player.
GROWN = """async () => { const node = LiteGraph.createNode('HeliosStreamVideo')
    const [, height] = node.size
    app.graph.add(node)
    app.graph.setDirtyCanvas(true, true)
    for (let i = 0; i < 3; i++) await new Promise(resolve => requestAnimationFrame(resolve))
    const grown = node.size[1] - height
    app.graph.remove(node)
    return grown }"""
# window.asked gets what is asked of the server for the video; window.cut() ends the newest answer in its middle.
REQUESTS = """() => { const original = window.fetch
    window.asked = []
    window.fetch = async (address, ...options) => {
        const answer = await original(address, ...options)
        const from = String(address.url ?? address).match(/helios[/]live[/].*from=(\\w+)/)?.[1]
        if (!from) return answer
        window.asked.push(from)
        const [through, cut] = [new TransformStream(), new AbortController()]
        answer.body.pipeTo(through.writable, {signal: cut.signal}).catch(() => {})
        window.cut = () => cut.abort()
        return new Response(through.readable, answer)
    } }"""
# Queues the graph. window.seen gets the clock and the picture's red, each time they have changed, until the run ends;
# window.shown the moment in the video of each picture that came onto the screen.
WATCH = """() => {
    window.seen = []
    window.shown = []
    window.ended = null
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, () => { window.ended = kind }, {once: true})
    const canvas = document.createElement('canvas')
    canvas.width = canvas.height = 32
    const context = canvas.getContext('2d', {willReadFrequently: true})
    const look = () => {
        const video = document.querySelector('.helios-live video')
        const show = (_, {mediaTime}) => { window.shown.push(mediaTime); video.requestVideoFrameCallback(show) }
        if (video && !video.watched) video.watched = video.requestVideoFrameCallback(show)
        if (video?.readyState >= 2 && video.currentTime !== window.seen.at(-1)?.clock) {
            context.drawImage(video, 0, 0, 32, 32)
            const {data} = context.getImageData(0, 0, 32, 32)
            const red = []
            for (let i = 0; i < 1024; i++) if (data[4 * i] > 120 && data[4 * i + 1] < 100) red.push([i % 32, i >> 5])
            const middle = red.reduce((sum, point) => sum + point[0], 0) / red.length
            window.seen.push({clock: video.currentTime, running: window.ended === null, ranges: video.buffered.length,
                              red: red.length, x: red.length ? middle : null})
        }
        if (window.ended === null) setTimeout(look, 50)
    }
    look()
    app.queuePrompt(0)
}"""
# More than a chunk, and the ball at places that are a fifth of the picture apart.
MOVED = """() => { const extent = values => Math.max(...values) - Math.min(...values)
    const seen = window.seen.filter(look => look.running && look.red > 20)
    return window.ended
        || extent(seen.map(look => look.clock)) > 1.5 && extent(seen.map(look => look.x)) > 6 }"""
FINISHED = """seconds => { const video = document.querySelector('.helios-live video')
    return !video.currentSrc.includes('from=') && !video.currentSrc.startsWith('blob:')
        && Math.abs(video.duration - seconds) < 0.1 }"""
PLAYER = "document.querySelector('.helios-live video')."

# What is said below the player when Finish was pressed before and after the least number of frames.
FINISHING = """async () => {
    const { Steering } = await import('/extensions/ComfyUI-Helios/helios_steer.js')
    const steering = new Steering()
    return [33, 99].map(written => {
        steering.show({ id: 'one', state: 'running', written, least: 99,
            steering: { prompts: true, endless: true, finishing: true, applied: [] } })
        return steering.state.textContent }) }"""

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


def start(page, seed):
    """Until the ball has moved, in a run that goes on."""
    page.load(read_workflow("helios_stream"))
    page.page.evaluate(SET_WIDGETS, {**VALUES, "seed": seed})
    page.page.evaluate(WATCH)
    page.page.wait_for_function(MOVED, timeout=240_000)
    assert page.page.evaluate("window.ended") is None


def has_file(page, server, end):
    """Until the run has this end, and the player the file."""
    page.page.wait_for_function("window.ended", timeout=180_000)
    assert page.page.evaluate("window.ended") == end
    page.page.evaluate(PLAYER + "playbackRate = 8")
    frames = server.get("/helios/live")["sessions"][-1]["written"]
    page.page.wait_for_function(FINISHED, arg=frames / 24, timeout=60_000)
    assert page.errors == []


def test_the_ball_moves_before_the_run_has_ended_and_cancel_keeps_what_was_shown(browser, server):
    """Under the content policy of --disable-api-nodes, as a plain source."""
    with open_page(browser, server.url) as page:
        assert page.page.evaluate(GROWN) == 0
        start(page, 42)
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=PICTURES / "live_plain.png")
        assert page.page.evaluate(PLAYER + "currentSrc").startswith("http")
        said = re.compile(r"Live · \d+ frames · \d+\.\d s buffered · \d+\.\d\d chunks/s, \d+\.\d\d × real time")
        page.page.locator(".helios-live").filter(has_text=said).wait_for()
        assert page.page.get_by_label("The video while it is made").evaluate("element => element.tagName") == "VIDEO"
        page.page.evaluate("() => app.api.interrupt()")
        has_file(page, server, "execution_interrupted")
        assert page.page.get_by_role("status").filter(has_text="Stopped before the end").count() == 1
        page.page.get_by_text("Cancelled. What was finished is in ").first.wait_for()


def test_where_no_policy_forbids_it_there_is_no_gap_and_a_request_that_was_cut_is_made_again(browser, server):
    """By MediaSource; the server cuts a request that is not read for minutes, as that of a player that is paused."""
    with open_page(browser, server.url, bypass_csp=True) as page:
        page.page.evaluate(REQUESTS)
        start(page, 43)
        page.page.screenshot(path=PICTURES / "live_fed.png")
        assert page.page.evaluate(PLAYER + "currentSrc").startswith("blob:")
        assert {look["ranges"] for look in page.page.evaluate("window.seen")} == {1}
        numbers = [moment * 24 for moment in page.page.evaluate("window.shown")]
        assert max(numbers) > 33  # behind the first seam
        assert numbers == pytest.approx([round(number) for number in numbers], abs=0.05)

        page.page.evaluate(PLAYER + "pause()")
        with page.page.expect_response(lambda answer: answer.url.endswith("/helios/live")):  # when it may ask again
            page.page.evaluate("window.cut()")
        assert page.page.evaluate(PLAYER + "paused && window.asked.length") == 1
        page.page.evaluate(PLAYER + "play()")
        page.page.wait_for_function("window.asked.length === 2 && " + PLAYER + "readyState >= 2", timeout=60_000)
        assert page.page.evaluate("window.asked") == ["start", "key"]
        page.page.get_by_role("button", name="Finish").click()
        has_file(page, server, "execution_success")


def test_finish_says_where_it_ends_if_not_at_once(used_page):
    assert used_page.page.evaluate(FINISHING) == ["It ends at 99 frames, which the node was given", ""]


@pytest.mark.parametrize("status", [200, 429])
def test_what_is_answered_about_another_video_is_not_said_of_this_one(used_page, status):
    assert used_page.page.evaluate(ASK, {"status": status}) == [None, "", []]
