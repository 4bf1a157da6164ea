"""A run that is steered in ComfyUI's page, on a server without a content policy; one that dies; and a long one."""

import json
import os
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pytest

from harness.browser import open_page, write_settings
from harness.client import run_workflow
from harness.host import Host, free_port
from harness.small import find, read_workflow, small_api

LIST = "/helios/live"
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


@pytest.fixture(scope="module")
def open_host(models, tmp_path_factory):
    """A server without --disable-api-nodes, on a port that it has again after a restart."""
    base = tmp_path_factory.mktemp("open")
    write_settings(base)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "fake.py").write_text(FAKE)
    options = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    with Host(base, models=models, port=free_port(), api_nodes=True, env=options) as host:
        yield host


def start(page, **values):
    page.load(read_workflow("helios_stream"))
    page.page.evaluate(WITH_CLIP)
    page.page.evaluate(SET_WIDGETS, {**VALUES, **values})
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


def anonymous_memory(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def read_all(url):
    with urllib.request.urlopen(url, timeout=120) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 16), b""))


def read_slowly(url, enough):
    with urllib.request.urlopen(url, timeout=120) as stream:
        while stream.read(200) and not enough.wait(0.2):
            pass


@pytest.mark.timeout(300 + 2 * CHUNKS)
def test_soak_a_long_steered_run_takes_no_more_memory_than_a_short_one(open_host):
    """Watched by one who reads all, one who is slow, and one who leaves; prompts come all the time."""
    api = small_api(
        "helios_stream", dict(open_host.get("/object_info")), frames=33 * CHUNKS, resume=False, seed=1, **STEPS
    )
    node, loader = find(api, "HeliosStreamVideo"), find(api, "HeliosDiffusersLoader")
    api["fake"] = {"class_type": "FakeModel", "inputs": {"model": api[node]["inputs"]["model"]}}
    api["fake vae"] = {"class_type": "FakeVAE", "inputs": {}}
    api[node]["inputs"] |= {"live": True, "clip": [loader, 1], "model": ["fake", 0], "vae": ["fake vae", 0]}

    memory, asked = {}, 0
    with ThreadPoolExecutor(3) as pool:
        run = pool.submit(run_workflow, open_host.url, api, timeout=3600)
        while not (found := [s for s in open_host.get(LIST)["sessions"] if s["state"] == "running"]):
            assert not run.done(), run.result()
            time.sleep(0.05)
        [session] = found
        url = f"{open_host.url}{LIST}/{session['id']}"
        everything = pool.submit(read_all, f"{url}.mp4?from=start")
        enough = threading.Event()
        pool.submit(read_slowly, f"{url}.mp4?from=start", enough)
        with urllib.request.urlopen(f"{url}.mp4?from=start", timeout=60) as leaving:
            leaving.read(100)
        while session["state"] == "running":
            [session] = [s for s in open_host.get(LIST)["sessions"] if s["id"] == session["id"]]
            memory[session["written"] // 33] = anonymous_memory(open_host.process.pid)
            if session["state"] == "running" and session["written"] // 33 >= (asked + 1) * CHUNKS // 12:
                asked += 1
                open_host.post(f"{LIST}/{session['id']}", {"prompt": f"A red ball, number {asked}.", "transition": 3})
            time.sleep(0.2)
        enough.set()
        [file] = run.result().files()
        assert everything.result() > 0
    with av.open(str(open_host.output / file["subfolder"] / file["filename"])) as container:
        assert container.streams.video[0].frames == 33 * CHUNKS
    assert session["steering"]["applied"] and session["state"] == "finished"
    early = max(value for made, value in memory.items() if made <= CHUNKS // 3)
    late = max(memory.values())
    print(f"{CHUNKS} chunks, {asked} prompts: {early / 1e6:.0f} MB in the first third, {late / 1e6:.0f} MB in all")
    assert late - early < 50e6
