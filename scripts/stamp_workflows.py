"""Write into our workflows what the page reads and does not write itself.

Into each node, which pack it comes from and from which version of it on it works: by this the page's manager finds what
missing nodes are in. Into the workflow, what it shows as an app (pages from 1.41 on): prompts, size, length and seed,
and the video. To run after a workflow was saved in the page, and after `version` or `requires-comfyui` in
pyproject.toml has changed; a test compares.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OF_THE_PAGE = ("Note", "MarkdownNote", "PrimitiveNode", "Reroute")  # which no pack brings

APP_INPUTS = {
    *("image", "file", "index", "positive", "prompt_1", "prompt_2", "prompt_3", "prompt_4"),
    *("width", "height", "frames", "seed"),
}
OF_THE_FIRST = ("width", "height", "seed")  # a video that goes on has those of the one before
APP_OUTPUT = "SaveVideo"


def workflow_files() -> list[Path]:
    return sorted((ROOT / "workflows").glob("*.json"))


def packs() -> tuple[dict[str, str], dict[str, str]]:
    """The properties of our own nodes and of ComfyUI's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    host = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    ours = {"cnr_id": project["project"]["name"], "ver": project["project"]["version"]}
    return ours, {"cnr_id": "comfy-core", "ver": host}


def app_data(workflow: dict[str, Any]) -> dict[str, Any]:
    """Widgets, in the order of the nodes, and nodes with results: as (id, name) and ids, which any such page reads."""
    nodes = sorted(workflow["nodes"], key=lambda node: (node["pos"][0], node["pos"][1]))
    widgets = [
        (node["id"], entry["name"])
        for node in nodes
        for entry in node.get("inputs") or ()
        if "widget" in entry and entry["link"] is None and entry["name"] in APP_INPUTS
    ]
    first = {name: (node, name) for node, name in reversed(widgets)}
    widgets = [(node, name) for node, name in widgets if name not in OF_THE_FIRST or first[name] == (node, name)]
    return {"inputs": widgets, "outputs": [node["id"] for node in nodes if node["type"] == APP_OUTPUT]}


def stamped(text: str) -> str:
    """A workflow's JSON with all of that in place."""
    workflow = json.loads(text)
    ours, core = packs()
    for node in workflow["nodes"]:
        if node["type"] not in OF_THE_PAGE:
            node["properties"] = {**node["properties"], **(ours if node["type"].startswith("Helios") else core)}
    workflow["extra"]["linearData"] = app_data(workflow)
    return json.dumps(workflow, indent=2) + "\n"


def main() -> None:
    for path in workflow_files():
        path.write_text(stamped(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
