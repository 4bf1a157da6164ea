"""Turn a workflow as the page saves it into what the server runs, without a page.

Follows what the page does for plain graphs: widget values in the order of the node's inputs (with the extra value that
`control_after_generate` adds, and the widgets that follow a choice), links, muted and bypassed nodes, notes, reroutes
and primitive nodes. Refuses the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ApiWorkflow = dict[str, dict[str, Any]]
MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"  # exist in the page only
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # of newer hosts (0.33): which widgets follow depends on its value
CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
SEEDS = ("seed", "noise_seed")  # have a control widget unless their node says otherwise
UPLOADS = ("image_upload", "video_upload", "audio_upload")  # a button, whose value is its kind of file


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> ApiWorkflow:
    """UI-format `workflow` -> API format. object_info: the server's answer to /object_info.

    Raises ValueError for node types the server does not have, subgraphs, and values that do not fit the node's widgets.
    """
    graph = Graph(workflow)
    api: ApiWorkflow = {}
    for node in graph.nodes.values():
        if node["type"] in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(
                f"Node {node['id']} is a {node['type']}, which this server does not have. Install its node pack; "
                "a subgraph must be unpacked, or the workflow exported with 'Export (API)'."
            )
        inputs = _widget_values(node, object_info[node["type"]])
        for slot in node.get("inputs") or ():
            source = graph.source(slot.get("link"))
            if isinstance(source, Constant):
                inputs[slot["name"]] = source.value
            elif source:
                inputs[slot["name"]] = list(source)
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api


class Constant:
    """The value of a primitive node."""

    def __init__(self, value: object) -> None:
        self.value = value


class Graph:
    """Nodes and links of a UI-format workflow."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        if "nodes" not in workflow:
            raise ValueError("This is no workflow in UI format: it has no 'nodes'.")
        self.nodes: dict[Any, dict[str, Any]] = {node["id"]: node for node in workflow["nodes"]}
        self.origins: dict[Any, tuple[Any, int]] = {}  # link id -> node id, output slot
        for link in workflow.get("links") or ():
            if isinstance(link, dict):
                self.origins[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.origins[link[0]] = (link[1], link[2])

    def source(self, link: Any) -> tuple[str, int] | Constant | None:
        """What feeds this link: the output of a node that runs, the value of a primitive, or nothing."""
        while link is not None and link in self.origins:
            node_id, slot = self.origins[link]
            node = self.nodes[node_id]
            if node.get("mode") == MUTED:
                return None
            if node["type"] == PRIMITIVE:
                return Constant(node["widgets_values"][0])
            if node["type"] == REROUTE:
                link = node["inputs"][0].get("link")
            elif node.get("mode") == BYPASSED:
                link = _bypass(node, slot)
            else:
                return str(node_id), slot
        return None


def _bypass(node: dict[str, Any], slot: int) -> Any:
    """The link that a bypassed node hands through to an output: the input of its type, its own position first."""
    kind, inputs = node["outputs"][slot]["type"], node.get("inputs") or []
    for entry in (*inputs[slot : slot + 1], *inputs):
        if entry["type"] == kind:
            return entry.get("link")
    return None


@dataclass(frozen=True)
class Widget:
    """One widget of a node, as the page makes it."""

    name: str
    default: Any
    second: tuple[str, ...] = ()  # possible values of a second widget that follows
    dynamic: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # inputs that follow, by this one's value


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Values of the node's widgets by input name; defaults where the workflow is older than an added widget."""
    given = node.get("widgets_values") or []
    rest = [] if isinstance(given, dict) else list(given)
    values = {}
    widgets = deque(_widgets(info["input"], info.get("input_order") or {}))
    while widgets:
        widget = widgets.popleft()
        if isinstance(given, dict):
            value = given.get(widget.name, widget.default)
            values[widget.name] = value
        else:
            value = rest.pop(0) if rest else widget.default
            values[widget.name] = _quote(value)
            if widget.second and rest and rest[0] in widget.second:
                rest.pop(0)
        if widget.dynamic:
            following = widget.dynamic.get(value, {})
            widgets.extendleft(reversed(list(_widgets(following, {}, f"{widget.name}."))))
    if rest:
        raise ValueError(
            f"Node {node['id']} ({node['type']}) has {len(given)} widget values, and {len(rest)} of them fit no input "
            "of this server's version. Open the workflow in ComfyUI and use 'Export (API)'."
        )
    return values


def _widgets(inputs: dict[str, Any], orders: dict[str, Any], prefix: str = "") -> Iterator[Widget]:
    """The widgets of a node's inputs, or of those that follow a choice, in the page's order."""
    for group in ("required", "optional"):
        specs = inputs.get(group) or {}
        for name in orders.get(group) or specs:
            kind, options = (*specs[name], {})[:2]
            choices = kind if isinstance(kind, list) else options.get("options") or []
            if kind == DYNAMIC:
                dynamic = {choice["key"]: choice["inputs"] for choice in choices}
                yield Widget(prefix + name, options.get("default", next(iter(dynamic), None)), dynamic=dynamic)
                continue
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
                continue
            default = options.get("default", choices[0] if choices else None)
            control = options.get("control_after_generate")
            second: tuple[str, ...] = ()
            if control or (control is None and kind == "INT" and name in SEEDS):
                second = CONTROLS
            elif any(options.get(upload) for upload in UPLOADS):
                second = tuple(upload.partition("_")[0] for upload in UPLOADS)
            yield Widget(prefix + name, default, second)


def _quote(value: Any) -> Any:
    """A list would be read as a link."""
    return {"__value__": value} if isinstance(value, list) else value
