"""Make subgraphs/*.json: whole tasks as one node of the page's library, out of the workflows of the same tasks.

To run after a workflow has changed; a test compares. The model's own folder says the schedule, so that any of the three
fits. ASCII, since 0.3.75 reads these files in the system's encoding.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "subgraphs"
NAMESPACE = uuid.UUID("6f2b5c0e-5d0a-4a53-9c1f-4c1f7f0f5a51")  # ours: a name gives the same id each time
INPUT, OUTPUT = -10, -20  # ids of a subgraph's two ends
LEFT_OUT = ("SaveVideo", "MarkdownNote", "HeliosDistilledSchedule", "LoadImage")


@dataclass(frozen=True)
class Blueprint:
    """What becomes of a workflow: sockets and widgets by (type of node, input), outputs by (type of node, output)."""

    name: str
    description: str
    workflow: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


MODEL = (("HeliosDiffusersLoader", "folder"), ("HeliosDiffusersLoader", "dtype"))
PROMPTS = (("HeliosTextEncode", "positive"), ("HeliosTextEncode", "negative"))
SIZE = tuple(("HeliosHistoryInjection", name) for name in ("width", "height", "frames"))
SEED = (("HeliosChunkedSampler", "seed"),)
STREAM = tuple(("HeliosStreamVideo", name) for name in ("seed", "crf", "resume"))
VIDEO = (("CreateVideo", "VIDEO"),)

BLUEPRINTS = (
    Blueprint(
        "Helios Text to Video",
        "A video of any length from a prompt, by Helios. Connect it to Save Video.",
        "helios_t2v_distilled",
        (*MODEL, *PROMPTS, *SIZE, *SEED),
        VIDEO,
    ),
    Blueprint(
        "Helios Image to Video",
        "A video of any length that begins with an image, by Helios. Connect it to Save Video.",
        "helios_i2v",
        (("HeliosHistoryInjection", "start_image"), *MODEL, *PROMPTS, *SIZE, *SEED),
        VIDEO,
    ),
    Blueprint(
        "Helios Minute into a File",
        "A minute of video, written into its file chunk by chunk: memory does not grow with the length. "
        "Connect it to Save Video.",
        "helios_stream",
        (*MODEL, *PROMPTS, *SIZE, *STREAM),
        (("HeliosStreamVideo", "video"), ("HeliosStreamVideo", "latent")),
    ),
)


def named_id(*names: str) -> str:
    return str(uuid.uuid5(NAMESPACE, "/".join(names)))


def made(blueprint: Blueprint) -> str:
    """The file's text."""
    workflow = json.loads((ROOT / "workflows" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    nodes = [node for node in workflow["nodes"] if node["type"] not in LEFT_OUT]
    links = kept_links(workflow, nodes)
    loader, sampler = find(nodes, "HeliosDiffusersLoader"), find(nodes, blueprint.inputs[-1][0])
    out, into = slot(loader, "schedule", "outputs"), slot(sampler, "schedule", "inputs")
    links.append((loader["id"], out, sampler["id"], into, "HELIOS_SCHEDULE"))
    ends: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}
    for kind, name in blueprint.inputs:
        node = find(nodes, kind)
        at = slot(node, name, "inputs")
        entry = node["inputs"][at]
        links.append((INPUT, len(ends["inputs"]), node["id"], at, entry["type"]))
        widget = {"widget": {"name": name}} if "widget" in entry else {}
        ends["inputs"].append({"name": name, "type": entry["type"], **widget, "link": None})
    for kind, name in blueprint.outputs:
        node = find(nodes, kind)
        at = slot(node, name, "outputs")
        links.append((node["id"], at, OUTPUT, len(ends["outputs"]), node["outputs"][at]["type"]))
        ends["outputs"].append({"name": name.lower(), "type": node["outputs"][at]["type"], "links": None})
    connect(nodes, links)
    outside = {
        "id": 1,
        "type": named_id(blueprint.name),
        "pos": [0, 0],
        "size": [420, 460],
        "flags": {},
        "order": 0,
        "mode": 0,
        **ends,
        "title": blueprint.name,
        "properties": {},
        "widgets_values": [],
    }
    whole = {
        "id": named_id(blueprint.name, "workflow"),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "definitions": {"subgraphs": [inside(blueprint, nodes, links, ends)]},
        "extra": {"BlueprintDescription": blueprint.description},  # up to 1.32
        "version": 0.4,
    }
    return json.dumps(whole, indent=2) + "\n"


def inside(blueprint: Blueprint, nodes: list[Any], links: list[Any], ends: dict[str, list[Any]]) -> dict[str, Any]:
    """The graph in the node."""
    right = max(node["pos"][0] + node["size"][0] for node in nodes)

    def outer(side: str, end: int) -> list[dict[str, Any]]:
        origin, at = (0, 1) if end == INPUT else (2, 3)
        return [
            {
                "id": named_id(blueprint.name, side, entry["name"]),
                "name": entry["name"],
                "type": entry["type"],
                "linkIds": [i for i, link in enumerate(links, 1) if (link[origin], link[at]) == (end, index)],
            }
            for index, entry in enumerate(ends[side])
        ]

    names = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    return {
        "id": named_id(blueprint.name),
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(node["id"] for node in nodes),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "description": blueprint.description,
        "category": "Helios",
        "inputNode": {"id": INPUT, "bounding": [-220, 60, 130, 40 + 20 * len(ends["inputs"])]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 90, 60, 120, 40 + 20 * len(ends["outputs"])]},
        "inputs": outer("inputs", INPUT),
        "outputs": outer("outputs", OUTPUT),
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [{"id": i, **dict(zip(names, link, strict=True))} for i, link in enumerate(links, 1)],
        "extra": {},
    }


def kept_links(workflow: dict[str, Any], nodes: list[dict[str, Any]]) -> list[tuple[int, int, int, int, str]]:
    """(origin, slot, target, slot, type) of the links between these nodes."""
    ids = {node["id"] for node in nodes}
    return [tuple(link[1:]) for link in workflow["links"] if {link[1], link[3]} <= ids]


def connect(nodes: list[dict[str, Any]], links: list[tuple[int, int, int, int, str]]) -> None:
    """Write the links' new ids into the nodes' slots."""
    by_id = {node["id"]: node for node in nodes}
    for node in nodes:
        for entry in node["inputs"]:
            entry["link"] = None
        for entry in node["outputs"]:
            entry["links"] = []
    for i, (origin, out, target, into, _) in enumerate(links, 1):
        if origin != INPUT:
            by_id[origin]["outputs"][out]["links"].append(i)
        if target != OUTPUT:
            by_id[target]["inputs"][into]["link"] = i


def find(nodes: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [node] = [node for node in nodes if node["type"] == kind]
    return node


def slot(node: dict[str, Any], name: str, side: str) -> int:
    """Index of an input or output."""
    return [entry["name"] for entry in node[side]].index(name)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for blueprint in BLUEPRINTS:
        (TARGET / f"{blueprint.name}.json").write_text(made(blueprint), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
