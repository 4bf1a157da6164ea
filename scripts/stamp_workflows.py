"""Write into every node of our workflows which pack it comes from, and from which version of it on it works.

By this the page's manager finds what a workflow's missing nodes are in. To run after a workflow was saved in the page,
and after `version` or `requires-comfyui` in pyproject.toml has changed; a test compares.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OF_THE_PAGE = ("Note", "MarkdownNote", "PrimitiveNode", "Reroute")  # which no pack brings
SUBGRAPH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # a node of this type is a graph of the same file


def workflow_files() -> list[Path]:
    return sorted((ROOT / "workflows").glob("*.json"))


def all_nodes(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a workflow in UI format, those in its subgraphs too."""
    yield from workflow["nodes"]
    for subgraph in workflow.get("definitions", {}).get("subgraphs", ()):
        yield from subgraph["nodes"]


def packs() -> tuple[dict[str, str], dict[str, str]]:
    """The properties of our own nodes and of ComfyUI's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    host = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    ours = {"cnr_id": project["project"]["name"], "ver": project["project"]["version"]}
    return ours, {"cnr_id": "comfy-core", "ver": host}


def stamped(text: str) -> str:
    """A workflow's JSON with the properties in place, in ASCII: 0.3.75 reads subgraphs in the system's encoding."""
    workflow = json.loads(text)
    ours, core = packs()
    for node in all_nodes(workflow):
        if node["type"] not in OF_THE_PAGE and not SUBGRAPH.fullmatch(node["type"]):
            node["properties"] = {**node["properties"], **(ours if node["type"].startswith("Helios") else core)}
    return json.dumps(workflow, indent=2) + "\n"


def main() -> None:
    for path in workflow_files():
        path.write_text(stamped(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
