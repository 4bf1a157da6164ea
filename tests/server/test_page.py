"""Our workflows in ComfyUI's own page: they open, run and play, and look like their pictures."""

import json
import os
import urllib.request

import pytest
from PIL import Image

from harness.small import FIRST_RUN, FRAMES, ON_TINY, ROOT, SMALL, WORKFLOWS, read_workflow
from harness.workflow import to_api

pytestmark = pytest.mark.browser
UPDATE = bool(os.environ.get("UPDATE_PICTURES"))  # `make pictures` takes them anew, with Helios-Tiny
PICTURES = ROOT / ("workflows" if UPDATE else "build/pictures")

ENLARGED = {FIRST_RUN: 3, "helios_upscale": 2}
RED_BALL = "A small red ball circles counterclockwise on a black background."
IN_ITS_WORLD = {
    "negative": "",
    "positive": RED_BALL,
    "prompt_1": RED_BALL,
    "prompt_2": RED_BALL.replace("red", "blue"),
    "prompt_3": "A small blue ball bounces up and down on a black background.",
    "32 positive": RED_BALL.replace("red", "blue"),  # of helios_extend, by the node's id
}

SET_WIDGETS = """values => {
    for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
        const value = values[`${node.id} ${widget.name}`] ?? values[widget.name]
        if (value !== undefined) widget.value = value
    } }"""
PLAY = """async () => { const video = document.querySelector('video[src*="type=output"]')
    if (!video) return JSON.stringify({found: false})
    video.muted = true
    await video.play()
    const from = video.currentTime
    for (let i = 0; i < 100 && video.currentTime === from; i++) await new Promise(resolve => setTimeout(resolve, 50))
    return JSON.stringify({found: true, duration: video.duration, width: video.videoWidth,
                           moved: video.currentTime !== from, error: video.error?.message ?? null}) }"""
OVERLAPS = """() => { const title = 30, height = node => Math.max(node.size[1], node.computeSize()[1])
    const over = (a, b) => a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0]
        && a.pos[1] - title < b.pos[1] + height(b) && b.pos[1] - title < a.pos[1] + height(a)
    const nodes = app.graph.nodes
    return nodes.flatMap((a, i) => nodes.slice(i + 1).filter(b => over(a, b)).map(b => `${a.type} ${b.type}`)) }"""
ADVANCED = """() => app.graph.nodes.filter(node => node.type.startsWith('Helios')).flatMap(node => (node.widgets ?? [])
    .filter(widget => widget.options?.advanced && node.isWidgetVisible(widget)).map(widget => widget.name))"""
# The host's CLIPLoader builds UMT5-XXL; see support.small.
BORROW_CLIP = """() => { const old = app.graph.nodes.find(node => node.type === 'CLIPLoader')
    if (!old) return
    const folder = LiteGraph.createNode('HeliosDiffusersLoader')
    app.graph.add(folder)
    folder.connect(1, app.graph.nodes.find(node => node.type === 'HeliosTextEncode'), 'clip')
    folder.widgets.find(widget => widget.name === 'folder').value = 'Helios-Distilled'
    old.mode = 2; return folder.id }"""
RETURN_CLIP = """id => { const old = app.graph.nodes.find(node => node.type === 'CLIPLoader')
    if (!old) return
    old.mode = 0
    old.connect(0, app.graph.nodes.find(node => node.type === 'HeliosTextEncode'), 'clip')
    app.graph.remove(app.graph.getNodeById(id)) }"""


def settings(name):
    """What a workflow is run with: a small size, and for its picture a model that has learnt something."""
    if name == FIRST_RUN and UPDATE:
        return {"seed": 42}
    values = {**SMALL, "height": 128, "seed": 42}
    if not UPDATE:
        return values | ({"frames": 33} if name in ON_TINY else {})
    variant = next((word.capitalize() for word in ("base", "mid") if name.endswith(word)), "Distilled")
    return {**values, **IN_ITS_WORLD, "folder": f"Helios-Tiny-{variant}"}


def frames(name):
    """That a workflow makes in these settings."""
    return 33 if name in ON_TINY and not UPDATE else FRAMES.get(name, 66)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_a_workflow_opens_runs_and_plays(used_page, info, name):
    page = used_page
    workflow = read_workflow(name)
    state = page.load(workflow)
    assert len(state["nodes"]) == len(workflow["nodes"])
    assert state["links"] == len(workflow["links"])
    assert not [node["type"] for node in state["nodes"] if node["missing"] or node["errors"]]
    assert page.warnings() == []
    assert page.page.evaluate(OVERLAPS) == []
    assert page.page.evaluate(ADVANCED) == []
    shown = {key: value for node in state["nodes"] for key, value in node["widgets"].items()}
    size = (128, 128) if name in ON_TINY else (640, 384)
    assert (shown["width"], shown["height"], shown["fps"]) == (*size, 24)
    if "t2v" in name:
        assert shown["frames"] == 264
    assert to_api(workflow, info) == page.to_api()

    borrowed = page.page.evaluate(BORROW_CLIP)
    page.page.evaluate(SET_WIDGETS, settings(name))
    result = page.run(120_000)
    assert result["kind"] == "execution_success", result
    page.page.evaluate(SET_WIDGETS, settings(name))  # after a run the page draws another seed
    page.page.evaluate(RETURN_CLIP, borrowed)

    page.page.wait_for_selector("video[src*='type=output']", timeout=20_000, state="attached")
    played = json.loads(page.page.evaluate(PLAY))
    assert played["found"] and played["moved"] and played["error"] is None, played
    assert played["duration"] == pytest.approx(frames(name) / 24, abs=0.1)
    assert played["width"] == SMALL["width"] * ENLARGED.get(name, 1)
    assert page.errors == []

    PICTURES.mkdir(parents=True, exist_ok=True)
    page.picture(PICTURES / f"{name}.jpg")
    taken, kept = (Image.open(folder / f"{name}.jpg") for folder in (PICTURES, ROOT / "workflows"))
    # Fonts and colours vary with the browser; nodes at other places would change the proportions.
    assert kept.width / kept.height == pytest.approx(taken.width / taken.height, rel=0.05)


def test_workflows_are_templates(server):
    """In the page: Workflow > Browse templates > ComfyUI-Helios. It takes the first of some folders of a pack: another
    one by a name that it knows would hide ours."""
    [(pack, names)] = [each for each in server.get("/api/workflow_templates").items() if "Helios" in each[0]]
    assert sorted(names) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/{pack}/{path.name}") == read_workflow(path.stem)
        picture = urllib.request.urlopen(f"{server.url}/api/workflow_templates/{pack}/{path.stem}.jpg").read()
        assert picture == path.with_suffix(".jpg").read_bytes()
