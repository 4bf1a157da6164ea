"""Take the pictures of the help pages: each node in ComfyUI's own page, and below it what Helios-Tiny makes with it.

Where a mistake has a look of its own, the lower row of frames shows it. `make pictures` runs this.
"""

from __future__ import annotations

import copy
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from harness.browser import ONLY_GRAPH, Page, chromium, open_page, write_settings
from harness.client import run_workflow
from harness.host import ROOT, Host
from harness.small import FIRST_RUN, find, read_workflow
from harness.workflow import ApiWorkflow, to_api

TARGET = ROOT / "web" / "docs" / "pictures"
WIDTH, GAP = 440, 6  # pixels of a picture, and between its parts
EVENLY = (0, 24, 49, 74, 98)
ONE_CHUNK = (0, 8, 16, 24, 32)
SEAM = (27, 30, 33, 36, 39)
BALL = "A small red ball circles counterclockwise on a black background."
FOX = "A red fox trots through a snowy birch forest at sunrise."


@dataclass(frozen=True)
class Shot:
    """Where a node is seen: a workflow, and whether it is to be put behind that one's loader or schedule first."""

    workflow: str
    behind: str | None = None
    rows: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (video, its frames)


TRAINED = (("ball", EVENLY),)
SHOTS = {
    "HeliosModelLoader": Shot("helios_t2v_distilled_files"),
    "HeliosDiffusersLoader": Shot(FIRST_RUN, rows=TRAINED),
    "HeliosLoraLoader": Shot("helios_t2v_distilled", "HeliosDiffusersLoader"),
    "HeliosMultiGPU": Shot("helios_t2v_distilled", "HeliosDiffusersLoader"),
    "HeliosCompile": Shot("helios_t2v_distilled", "HeliosDiffusersLoader"),
    "HeliosTextEncode": Shot(FIRST_RUN, rows=(*TRAINED, ("unknown words", EVENLY))),
    "HeliosPromptSchedule": Shot("helios_interactive", rows=(("two prompts", (0, 33, 66, 99, 131)),)),
    "HeliosPromptFromFile": Shot("helios_prompt_file"),
    "HeliosHistoryInjection": Shot(FIRST_RUN, rows=(*TRAINED, ("another size", EVENLY))),
    "HeliosBaseSchedule": Shot("helios_t2v_base", rows=(("base", ONE_CHUNK), ("wrong schedule", ONE_CHUNK))),
    "HeliosPyramidSchedule": Shot("helios_t2v_mid"),
    "HeliosDistilledSchedule": Shot("helios_t2v_distilled"),
    "HeliosAntiDrift": Shot("helios_t2v_distilled", "HeliosDistilledSchedule"),
    "HeliosChunkedSampler": Shot(FIRST_RUN, rows=TRAINED),
    "HeliosChunkedVAEDecode": Shot(FIRST_RUN, rows=(("ball", SEAM), ("ordinary decoder", SEAM))),
    "HeliosStreamVideo": Shot("helios_stream", rows=TRAINED),
}

INSERT = """([kind, behind]) => {
    const before = app.graph.nodes.find(node => node.type === behind)
    const node = LiteGraph.createNode(kind)
    app.graph.add(node)
    node.pos = [before.pos[0], 2000]  // below all others
    const type = node.outputs[0].type, slot = before.outputs.findIndex(output => output.type === type)
    const next = app.graph.nodes.find(other => other !== node && other.inputs?.some(input => input.link !== null
        && app.graph.getLink(input.link).origin_id === before.id && input.type === type))
    const into = next.inputs.findIndex(input => input.type === type)
    before.connect(slot, node, node.inputs.findIndex(input => input.type === type))
    node.connect(0, next, into)
    const file = node.widgets.find(widget => widget.name === 'lora_name')
    if (file) file.value = 'my_style.safetensors'
}"""
SHOW = """kind => {
    const node = app.graph.nodes.find(node => node.type === kind)
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [400 - node.pos[0], 150 - node.pos[1]]
    app.canvas.setDirty(true, true)
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const shown = (node.widgets ?? []).filter(widget => node.isWidgetVisible(widget))
    const drawn = Math.max(...shown.map(widget => widget.y + (widget.computedHeight ?? 24))) + 16
    const height = Math.min(node.size[1], Math.max(drawn, node.computeSize()[1])) // without room for a preview
    return [canvas.x + 400, canvas.y + 150, node.size[0], height]
}"""


def videos(first_run: ApiWorkflow) -> dict[str, ApiWorkflow]:
    """What the rows of frames are taken from: the first workflow, up to its frames, with other nodes and inputs."""
    loader, text, history, sampler, decoder = (
        find(first_run, f"Helios{kind}")
        for kind in ("DiffusersLoader", "TextEncode", "HistoryInjection", "ChunkedSampler", "ChunkedVAEDecode")
    )
    save = {"class_type": "SaveImage", "inputs": {"images": [decoder, 0], "filename_prefix": "help"}}
    kept = {key: first_run[key] for key in (loader, text, history, sampler, decoder)} | {"save": save}

    def changed(*changes: tuple[str, str, Any]) -> ApiWorkflow:
        """With these inputs, as (node, input, value)."""
        api = copy.deepcopy(kept)
        for node, name, value in changes:
            api[node]["inputs"][name] = value
        return api

    base = ((loader, "folder", "Helios-Tiny-Base"), (history, "frames", 33))
    distilled = {f"steps_stage_{i}": 2 for i in (1, 2, 3)} | {"amplify_first_chunk": True, "shift_level": "stage"}
    prompts = {
        **{f"prompt_{i}": words for i, words in enumerate((BALL, BALL.replace("red", "blue"), "", ""), 1)},
        **{f"length_{i}": chunks for i, chunks in enumerate((2.0, 2.0, 0.0, 0.0), 1)},
    }
    values = {"clip": [loader, 1], "unit": "chunks", "blend": 1, "negative": ""}
    ordinary = {"samples": [sampler, 0], "vae": [loader, 2]}
    return {
        "ball": changed(),
        "ordinary decoder": changed() | {decoder: {"class_type": "VAEDecode", "inputs": ordinary}},
        "unknown words": changed((text, "positive", FOX)),
        "another size": changed((history, "width", 320), (history, "height", 192)),
        "two prompts": changed((history, "frames", 132))
        | {text: {"class_type": "HeliosPromptSchedule", "inputs": prompts | values}},
        "base": changed(*base),
        "wrong schedule": changed(*base, (sampler, "schedule", ["other", 0]))
        | {"other": {"class_type": "HeliosDistilledSchedule", "inputs": distilled}},
    }


def take(host: Host, api: ApiWorkflow) -> list[Image.Image]:
    return [
        Image.open(host.output / entry["subfolder"] / entry["filename"]).convert("RGB")
        for entry in run_workflow(host.url, api, timeout=600).files()
    ]


def node_picture(page: Page, kind: str, shot: Shot) -> Image.Image:
    page.load(read_workflow(shot.workflow))
    if shot.behind:
        page.page.evaluate(INSERT, [kind, shot.behind])
    page.fit()
    x, y, width, height = page.page.evaluate(SHOW, kind)
    page.page.wait_for_timeout(300)
    taken = page.page.screenshot(clip={"x": x - 20, "y": y - 50, "width": width + 40, "height": height + 60})
    return Image.open(io.BytesIO(taken)).convert("RGB")


def fitted(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def row(frames: list[Image.Image], at: tuple[int, ...]) -> Image.Image:
    parts = [fitted(frames[index], (WIDTH - GAP * (len(at) - 1)) // len(at)) for index in at]
    whole = Image.new("RGB", (WIDTH, parts[0].height), "white")
    for i, part in enumerate(parts):
        whole.paste(part, (i * (part.width + GAP), 0))
    return whole


def stacked(parts: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + GAP * (len(parts) - 1)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + GAP
    return whole


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        write_settings(Path(base))
        with Host(Path(base)) as host, chromium() as browser, open_page(browser, host.url) as page:
            first_run = to_api(read_workflow(FIRST_RUN), host.get("/object_info"))
            made = {name: take(host, api) for name, api in videos(first_run).items()}
            page.page.add_style_tag(content=ONLY_GRAPH)
            for kind, shot in SHOTS.items():
                parts = [fitted(node_picture(page, kind, shot), WIDTH)]
                parts += [row(made[name], at) for name, at in shot.rows]
                stacked(parts).save(TARGET / f"{kind}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
