"""The harness itself: what it converts, hears and raises on a real server."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from harness.browser import Page
from harness.client import ExecutionFailed, PromptRejected, run_workflow
from harness.host import Host
from harness.workflow import to_api


def node(number: int, kind: str, values: list[Any], inputs: list[tuple[Any, ...]], outputs: str = "", mode: int = 0):
    """A UI-format node. inputs: (name, type, link or None[, name of its widget])."""
    slots = [
        {"name": name, "type": type_, "link": link, **({"widget": {"name": widget[0]}} if widget else {})}
        for name, type_, link, *widget in inputs
    ]
    outs = [{"name": type_, "type": type_, "links": []} for type_ in outputs.split()]
    return {
        "id": number,
        "type": kind,
        "pos": [300 * number, 0],
        "size": [250, 100],
        "flags": {},
        "order": number,
        "mode": mode,
        "inputs": slots,
        "outputs": outs,
        "properties": {},
        "widgets_values": values,
    }


def graph(nodes: list[dict[str, Any]], links: list[list[Any]]) -> dict[str, Any]:
    by_id = {n["id"]: n for n in nodes}
    for number, origin, slot, *_ in links:
        by_id[origin]["outputs"][slot]["links"].append(number)
    ids = {"last_node_id": 99, "last_link_id": 99}
    return {**ids, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def odd_graph() -> dict[str, Any]:
    """Everything that the page treats in a way of its own: note, primitive, reroute, bypassed, muted, seed control."""
    nodes = [
        node(1, "EmptyImage", [64, 64, 5, 255], [("batch_size", "INT", 7, "batch_size")], "IMAGE"),
        node(2, "Reroute", [], [("", "*", 1)], "IMAGE"),
        node(3, "ImageInvert", [], [("image", "IMAGE", 2)], "IMAGE", mode=4),
        node(4, "CreateVideo", [24], [("images", "IMAGE", 3), ("audio", "AUDIO", None)], "VIDEO"),
        node(5, "SaveVideo", ["video/odd", "auto", "auto"], [("video", "VIDEO", 4)]),
        node(6, "SaveVideo", ["video/muted", "auto", "auto"], [("video", "VIDEO", 5)], mode=2),
        node(7, "PrimitiveNode", [3, "fixed"], [], "INT"),
        node(8, "Note", ["a word to the reader"], []),
        node(9, "RandomNoise", [42, "increment"], [], "NOISE"),
    ]
    nodes[6]["outputs"][0]["widget"] = {"name": "batch_size"}
    links = [
        [1, 1, 0, 2, 0, "IMAGE"],
        [2, 2, 0, 3, 0, "IMAGE"],
        [3, 3, 0, 4, 0, "IMAGE"],
        [4, 4, 0, 5, 0, "VIDEO"],
        [5, 4, 0, 6, 0, "VIDEO"],
        [7, 7, 0, 1, 0, "INT"],
    ]
    return graph(nodes, links)


def test_odd_graph_runs_without_a_page(server: Host) -> None:
    workflow = to_api(odd_graph(), server.get("/object_info"))
    assert sorted(workflow) == ["1", "4", "5", "9"]
    assert workflow["1"]["inputs"] == {"width": 64, "height": 64, "batch_size": 3, "color": 255}
    assert workflow["4"]["inputs"]["images"] == ["1", 0]
    assert workflow["9"]["inputs"] == {"noise_seed": 42}
    run = run_workflow(server.url, workflow)
    assert [file["subfolder"] for file in run.files()] == ["video"]
    assert run.executed() == ["1", "4", "5"]


def test_unknown_node_and_too_many_values_are_refused(server: Host) -> None:
    info = server.get("/object_info")
    with pytest.raises(ValueError, match=re.escape("Node 1 is a Sonnet, which this server does not have")):
        to_api(graph([node(1, "Sonnet", [], [])], []), info)
    with pytest.raises(ValueError, match=r"Node 1 \(EmptyImage\) has 5 widget values, and 1 of them"):
        to_api(graph([node(1, "EmptyImage", [64, 64, 5, 255, 9], [], "IMAGE")], []), info)


def choice(options: dict[str, Any]) -> list[Any]:
    """A dynamic combo, as /object_info of newer hosts (0.33) describes it: each option brings inputs of its own."""
    described = [{"key": key, "inputs": {"required": inputs}} for key, inputs in options.items()]
    return ["COMFY_DYNAMICCOMBO_V3", {"options": described}]


ENCODING = choice({"auto": {}, "re-encode": {"crf": ["FLOAT", {"default": 23.0}]}})
CODEC = choice({"auto": {}, "h264": {"encoding": ENCODING, "preset": ["STRING", {"default": "slow"}]}})
NEWER_SAVE = {
    "input": {
        "required": {"video": ["VIDEO", {}], "prefix": ["STRING", {}], "format": choice({"auto": {"codec": CODEC}})},
        "optional": {"suffix": ["STRING", {"default": "x"}]},
    }
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a"], {"prefix": "a", "format": "auto", "format.codec": "auto", "suffix": "x"}),
        (["a", "auto", "auto"], {"prefix": "a", "format": "auto", "format.codec": "auto", "suffix": "x"}),
        (
            ["a", "auto", "h264", "re-encode", 18.0, "fast", "y"],
            {
                "prefix": "a",
                "format": "auto",
                "format.codec": "h264",
                "format.codec.encoding": "re-encode",
                "format.codec.encoding.crf": 18.0,
                "format.codec.preset": "fast",
                "suffix": "y",
            },
        ),
        (
            {"prefix": "a", "format.codec": "h264"},
            {
                "prefix": "a",
                "format": "auto",
                "format.codec": "h264",
                "format.codec.encoding": "auto",
                "format.codec.preset": "slow",
                "suffix": "x",
            },
        ),
    ],
    ids=["older workflow", "saved on 0.3.75", "every choice made", "by name"],
)
def test_widgets_that_follow_a_choice_come_right_behind_it(given: Any, expected: dict[str, Any]) -> None:
    api = to_api(graph([node(1, "Save", given, [])], []), {"Save": NEWER_SAVE})
    assert api["1"]["inputs"] == expected
    assert list(api["1"]["inputs"]) == list(expected)


def test_rejection_names_node_and_reason(server: Host) -> None:
    workflow = to_api(odd_graph(), server.get("/object_info"))
    workflow["1"]["inputs"]["width"] = 0
    with pytest.raises(PromptRejected, match=r"node 1 \(EmptyImage\): Value 0 smaller than min"):
        run_workflow(server.url, workflow)


def test_failure_names_node_and_reason_and_the_server_goes_on(server: Host) -> None:
    workflow = to_api(odd_graph(), server.get("/object_info"))
    bad = json.loads(json.dumps(workflow))
    bad["1"]["inputs"] |= {"width": 63, "height": 63}  # h264 takes even sizes only
    with pytest.raises(ExecutionFailed, match=r"node 5 \(SaveVideo\): ") as caught:
        run_workflow(server.url, bad)
    assert caught.value.run.executed()[-1] == "5"
    assert run_workflow(server.url, workflow).files()


@pytest.mark.browser
def test_converter_agrees_with_the_page(used_page: Page, server: Host) -> None:
    """And on all our workflows (test_page.py)."""
    used_page.load(odd_graph())
    assert to_api(odd_graph(), server.get("/object_info")) == used_page.to_api()


@pytest.mark.browser
@pytest.mark.parametrize(
    "values",
    [["scale dimensions", 96, 64, "center", "area"], ["scale by multiplier", 2.0, "lanczos"]],
    ids=lambda values: values[0],
)
def test_converter_agrees_with_the_page_on_a_choice(values: list[Any], used_page: Page, server: Host) -> None:
    info = server.get("/object_info")
    if "ResizeImageMaskNode" not in info:
        pytest.skip("this host has no node with such a choice")
    nodes = [
        node(1, "EmptyImage", [64, 64, 1, 255], [], "IMAGE"),
        node(2, "ResizeImageMaskNode", values, [("input", "IMAGE,MASK", 1)], "IMAGE"),
        node(3, "PreviewImage", [], [("images", "IMAGE", 2)]),
    ]
    workflow = graph(nodes, [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]])
    used_page.load(workflow)
    assert to_api(workflow, info) == used_page.to_api()
