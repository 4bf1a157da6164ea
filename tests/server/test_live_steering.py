"""A run that is steered in ComfyUI's page, on a server without a content policy; one that dies; and a long one."""

import json
import os
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from harness.browser import open_page, write_settings
from harness.client import run_workflow
from harness.host import Host, free_port
from harness.small import ROOT, find, read_workflow, small_api

LIST = "/helios/live"
PICTURES = ROOT / "build/pictures"
CHUNKS = int(os.environ.get("HELIOS_CHUNKS", 60))  # of the long run; `make soak-live` makes an hour
SPEED = 16  # times real time
# A network that answers at once with nothing, and a decoder that has its pictures ready.
FAKE = f"""
import time
import torch
from comfy.patcher_extension import WrappersMP

class FakeModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"model": ("MODEL",)}}}}

    def make(self, model):
        def wrapper(executor, x, *args, **kwargs):
            time.sleep(33 / 24 / {SPEED} / 3)
            return torch.zeros_like(x)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
        return (model,)

class FakeVAE:
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}

    def make(self):
        wave = torch.arange(33).view(33, 1, 1, 1) * 0.2 + torch.arange(128).view(1, 1, 128, 1) * 0.1
        frames = (0.5 + 0.4 * wave.sin()).expand(33, 64, 128, 3)[None].contiguous()

        class Fake:
            def decode(self, samples):
                return frames.clone()

        return (Fake(),)

NODE_CLASS_MAPPINGS = {{"FakeModel": FakeModel, "FakeVAE": FakeVAE}}
"""
WITH_CLIP = """() => { const find = type => app.graph.nodes.find(node => node.type === type)
    const stream = find('HeliosStreamVideo')
    find('HeliosDiffusersLoader').connect(1, stream, stream.inputs.findIndex(input => input.name === 'clip')) }"""
SET_WIDGETS = """values => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
    if (values[widget.name] !== undefined) widget.value = values[widget.name] }"""
RUN = """() => { window.ended = null
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, () => { window.ended = kind }, {once: true})
    app.queuePrompt(0).catch(() => {}) }"""
STATUS = "said => document.querySelector('.helios-live [role=status]').textContent === said"
STEPS = {"steps_stage_1": 1, "steps_stage_2": 1, "steps_stage_3": 1, "amplify_first_chunk": False}
VALUES = {
    "folder": "Helios-Tiny-Distilled",
    "positive": "A small red ball circles counterclockwise on a black background.",
    "negative": "",
    "width": 64,
    "height": 64,
    "frames": 33,
    "resume": False,
    "live": True,
    "until_finished": True,
    **STEPS,
}
NEXT = "A small blue ball circles counterclockwise on a black background. <b onclick='1'>"
LAST = "A small green square bounces up and down."
FRIEND, STRANGER = "https://friend.example", "https://stranger.example"
INTO_SUBGRAPH = """() => { const graph = app.rootGraph ?? app.graph
    const node = graph.nodes.find(node => node.type === 'HeliosStreamVideo')
    if (node) graph.convertToSubgraph(new Set([node]))
    const around = graph.nodes.find(node => node.subgraph)
    app.canvas.openSubgraph(around.subgraph, around) }"""
SERIALIZE = "() => JSON.stringify((app.rootGraph ?? app.graph).serialize())"
INNER_NODES = "() => app.canvas.graph.nodes.length"
# How far the player reaches over its node's edges: left, right.
OVERHANG = """() => { const player = document.querySelector('.helios-live')
    const [inner, outer] = [player, player.closest('[data-node-id]')].map(element => element.getBoundingClientRect())
    return [outer.left - inner.left, inner.right - outer.right] }"""
# window.held gets the most seconds of the video that the page has had at once, window.begin where the newest began.
HOLD = """speed => { window.held = window.begin = 0
    setInterval(() => { const video = document.querySelector('.helios-live video')
        if (!video?.currentSrc.startsWith('blob:') || !video.buffered.length) return
        video.playbackRate = speed
        window.begin = video.buffered.start(0)
        window.held = Math.max(window.held, video.buffered.end(video.buffered.length - 1) - window.begin) }, 50) }"""


@pytest.fixture(scope="module")
def open_host(models, tmp_path_factory):
    """A server without --disable-api-nodes, on a port that it has again after a restart."""
    base = tmp_path_factory.mktemp("open")
    write_settings(base)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "fake.py").write_text(FAKE)
    options = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    cors = ["--enable-cors-header", FRIEND]
    with Host(base, models=models, port=free_port(), api_nodes=True, env=options, options=cors) as host:
        yield host


def start(page, **values):
    page.load(read_workflow("helios_stream"))
    page.page.evaluate(WITH_CLIP)
    page.page.evaluate(SET_WIDGETS, {**VALUES, **values})
    run(page)


def run(page):
    page.page.evaluate(RUN)
    page.page.wait_for_function("document.querySelector('.helios-live video')?.currentTime > 0", timeout=180_000)


@pytest.mark.timeout(900)  # with a restart of the server
@pytest.mark.browser
def test_a_prompt_from_the_box_takes_over_finish_ends_it_and_a_server_that_dies_shows(browser, open_host):
    with open_page(browser, open_host.url) as page:
        start(page, seed=42)
        assert page.page.evaluate("document.querySelector('.helios-live video').currentSrc").startswith("blob:")
        box = page.page.locator(".helios-steering textarea")
        box.fill(NEXT)
        page.page.locator(".helios-steering input").fill("2")
        box.press("Control+Enter")
        applied = page.page.locator(".helios-steering li")
        applied.first.wait_for(timeout=120_000)
        assert NEXT in applied.first.inner_text()
        assert applied.first.evaluate("entry => entry.childElementCount") == 0
        queue = open_host.get("/queue")
        assert (len(queue["queue_running"]), queue["queue_pending"]) == (1, [])  # the page's own Control+Enter queues
        page.page.get_by_role("button", name="Finish").click()
        page.page.wait_for_function("window.ended", timeout=180_000)
        page.page.wait_for_function(STATUS, arg="Finished", timeout=60_000)
        link = page.page.locator(".helios-steering a").get_attribute("href")
        with urllib.request.urlopen(open_host.url + link, timeout=60) as answer:
            told = json.loads(answer.read())
        assert told["begins_with"] == VALUES["positive"]
        [change] = told["prompts"]
        assert (change["prompt"], change["transition"]) == (NEXT, 2)
        assert 1 <= change["after_chunk"] < told["chunks"]
        [file] = sorted(open_host.output.rglob("*.mp4"))
        with av.open(str(file)) as container:
            assert container.streams.video[0].frames == 33 * told["chunks"]
        assert page.errors == []

        start(page, seed=43)
        open_host.process.kill()
        open_host.process.wait()
        open_host.start()
        page.page.wait_for_function(STATUS, arg="Stopped before the end", timeout=120_000)
        assert page.errors == []


def box(page):
    return page.page.get_by_role("textbox", name=re.compile("describe the whole picture|描述整个画面"))


def applied(page, number):
    """What is listed below the box, as soon as it is so much."""
    entries = page.page.locator(".helios-steering li")
    entries.nth(number - 1).wait_for(timeout=120_000)
    return entries.all_inner_texts()


@pytest.mark.timeout(600)
@pytest.mark.browser
def test_nodes_2_0_a_subgraph_a_reload_and_a_second_tab_show_the_same_prompts(browser, open_host):
    """The box works in all of them, and what is typed into it changes the chunks after it and no other."""
    with open_page(browser, open_host.url) as page:
        page.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
        page.load(read_workflow("helios_stream"))
        page.page.evaluate(WITH_CLIP)
        page.page.evaluate(SET_WIDGETS, {**VALUES, "seed": 44, "resume": True})
        page.page.evaluate(INTO_SUBGRAPH)
        run(page)
        page.fit()
        box(page).fill(NEXT)
        page.page.keyboard.press("Delete")  # is the box's, not the graph's
        page.page.keyboard.press("Tab")
        page.page.keyboard.type("2")
        page.page.get_by_role("button", name="Apply").click()
        [shown] = applied(page, 1)
        assert NEXT in shown
        assert page.page.evaluate(INNER_NODES) == 1
        assert max(page.page.evaluate(OVERHANG)) < 1
        page.page.screenshot(path=PICTURES / "live_vue.png")

        workflow, api = json.loads(page.page.evaluate(SERIALIZE)), page.to_api()
        page.open()
        page.load(workflow)
        page.page.evaluate(INTO_SUBGRAPH)
        assert applied(page, 1) == [shown]
        open_host.post("/settings/Comfy.VueNodes.Enabled", False)
        with open_page(browser, open_host.url, locale="zh-CN") as second:
            second.load(workflow)
            throttle(second)
            second.page.evaluate(INTO_SUBGRAPH)
            second.fit()
            second.page.wait_for_function(
                "document.querySelector('.helios-live video')?.currentTime > 0", timeout=60_000
            )
            assert NEXT in applied(second, 1)[0]
            box(second).fill(LAST)
            box(second).press("Control+Enter")
            for tab in (page, second):
                newest, oldest = applied(tab, 2)
                assert LAST in newest and NEXT in oldest
            second.page.screenshot(path=PICTURES / "live_second_tab.png")
            second.page.get_by_role("button", name="结束").click()
            second.page.wait_for_function(STATUS, arg="已完成", timeout=180_000)
        page.page.wait_for_function(STATUS, arg="Finished", timeout=60_000)
        # The page's own, where it hears of a node before it has the graph again.
        assert [error for error in page.errors + second.errors if error != "Subgraph not found"] == []

    steered = saved_chunks(open_host)
    change = open_host.get(LIST)["sessions"][-1]["steering"]["applied"][0]
    before, node = change["after_chunk"], find(api, "HeliosStreamVideo")
    api[node]["inputs"] |= {"until_finished": False, "live": False}
    api[find(api, "HeliosHistoryInjection")]["inputs"]["frames"] = 33 * (before + 1)
    run_workflow(open_host.url, api)
    plain = saved_chunks(open_host)
    assert change["transition"] == 2 and 1 <= before < len(steered)
    assert [torch.equal(*pair) for pair in zip(steered, plain, strict=False)] == [True] * before + [False]


def throttle(page):
    """To what a bad line has: 30 KB a second."""
    speed = {"offline": False, "latency": 200, "downloadThroughput": 30_000, "uploadThroughput": 30_000}
    client = page.page.context.new_cdp_session(page.page)
    client.send("Network.enable")
    client.send("Network.emulateNetworkConditions", speed)


def saved_chunks(host):
    """Latents of the newest run, chunk by chunk."""
    files = sorted((host.output / "helios_resume").rglob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    return [load_file(file)["latents"] for file in sorted(files[-1].parent.glob("*.safetensors"))]


def anonymous_memory(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def long_run(host):
    """An API-format graph of CHUNKS chunks by the fake model, without its seed."""
    info = dict(host.get("/object_info"))
    api = small_api("helios_stream", info, frames=33 * CHUNKS, resume=False, **STEPS)
    node, loader = find(api, "HeliosStreamVideo"), find(api, "HeliosDiffusersLoader")
    api["101"] = {"class_type": "FakeModel", "inputs": {"model": api[node]["inputs"]["model"]}}
    api["102"] = {"class_type": "FakeVAE", "inputs": {}}
    api[node]["inputs"] |= {"live": True, "clip": [loader, 1], "model": ["101", 0], "vae": ["102", 0]}
    return api


def read_all(url):
    with urllib.request.urlopen(url, timeout=120) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 16), b""))


def read_slowly(url, enough):
    with urllib.request.urlopen(url, timeout=120) as stream:
        while stream.read(200) and not enough.wait(0.2):
            pass


class PageMemory:
    """What a page takes that watches at SPEED, sampled: its scripts after a collection, and all of its processes."""

    def __init__(self, page, browser):
        self.page, self.browser = page.page.context.new_cdp_session(page.page), browser.new_browser_cdp_session()
        self.page.send("Performance.enable")
        page.page.evaluate(HOLD, SPEED)

    def sample(self):
        self.page.send("HeapProfiler.collectGarbage")
        metrics = {entry["name"]: entry["value"] for entry in self.page.send("Performance.getMetrics")["metrics"]}
        processes = self.browser.send("SystemInfo.getProcessInfo")["processInfo"]
        renderers = sum(anonymous_memory(process["id"]) for process in processes if process["type"] == "renderer")
        return metrics["JSHeapUsedSize"], renderers


@pytest.mark.timeout(300 + 2 * CHUNKS)
@pytest.mark.browser
def test_soak_a_long_steered_run_takes_no_more_memory_than_a_short_one(browser, open_host):
    """Of server and page. Read by one who takes all, one who is slow, and one who leaves; prompts come all the time,
    from a page of the address that --enable-cors-header names.
    """
    api = long_run(open_host)
    server, scripts, pages = {}, {}, {}  # bytes, by the chunks that were made
    with open_page(browser, open_host.url) as page, ThreadPoolExecutor(3) as pool:
        page.load_api(api)
        memory = PageMemory(page, browser)
        run = pool.submit(run_workflow, open_host.url, api, timeout=3600)
        while not (found := [s for s in open_host.get(LIST)["sessions"] if s["state"] == "running"]):
            assert not run.done(), run.result()
            page.page.wait_for_timeout(50)
        [session] = found
        url = f"{open_host.url}{LIST}/{session['id']}"
        everything = pool.submit(read_all, f"{url}.mp4?from=start")
        enough = threading.Event()
        pool.submit(read_slowly, f"{url}.mp4?from=start", enough)
        with urllib.request.urlopen(f"{url}.mp4?from=start", timeout=60) as leaving:
            leaving.read(100)
        assert steered_from(STRANGER, url, 0) == 403
        while session["state"] == "running":
            [session] = [s for s in open_host.get(LIST)["sessions"] if s["id"] == session["id"]]
            made = session["written"] // 33
            server[made] = anonymous_memory(open_host.process.pid)
            if session["state"] == "running" and made >= (len(pages) + 1) * CHUNKS // 12:
                scripts[made], pages[made] = memory.sample()
                assert steered_from(FRIEND, url, len(pages)) in (200, 409)  # it may have ended by now
            page.page.wait_for_timeout(200)
        enough.set()
        [file] = run.result().files()
        assert everything.result() > 0
        page.page.wait_for_function("window.begin > 0")  # what was played is gone
        held = page.page.evaluate("window.held")
        assert page.errors == []
    with av.open(str(open_host.output / file["subfolder"] / file["filename"])) as container:
        assert container.streams.video[0].frames == 33 * CHUNKS
    assert session["steering"]["applied"] and session["state"] == "finished"
    print(f"{CHUNKS} chunks, {len(pages)} prompts; the page has held {held:.0f} s of the video at once")
    for name, taken, limit in (("server", server, 50e6), ("page's scripts", scripts, 10e6), ("page", pages, 100e6)):
        early, late = max(value for made, value in taken.items() if made <= CHUNKS // 3), max(taken.values())
        print(f"{name}: {early / 1e6:.0f} MB in the first third, {late / 1e6:.0f} MB in all")
        assert late - early < limit, name
    assert held < 60  # of 82 s at least


def steered_from(origin, url, number):
    """The status of what a page of this address asks for."""
    data = json.dumps({"prompt": f"A red ball, number {number}.", "transition": 3}).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "application/json", "Origin": origin}), timeout=30
        ) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
