"""Our subgraph blueprints are in the page's library, and a node of one is the whole workflow."""

import json

import pytest

from harness.small import ROOT

NAMES = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
SET = """values => { const [node] = app.graph.nodes
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(widget => widget.name === name)
        widget.value = value
        widget.callback?.(value)
    } }"""
VALUES = {"folder": "Helios-Tiny-Mid", "positive": "A big blue square.", "width": 256, "frames": 99, "seed": 7}


def test_the_server_offers_them(server):
    offered = {entry["name"]: key for key, entry in server.get("/global_subgraphs").items()}
    assert set(NAMES) <= set(offered)
    for name in NAMES:
        text = server.get(f"/global_subgraphs/{offered[name]}")["data"]
        assert text == (ROOT / "subgraphs" / f"{name}.json").read_text(encoding="ascii")


@pytest.mark.browser
def test_what_is_set_on_the_node_reaches_the_nodes_in_it(page):
    for name in NAMES:
        page.load(json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="ascii")))
        page.page.evaluate(SET, VALUES)
        inputs = {node["class_type"]: node["inputs"] for node in page.to_api().values()}
        maker = inputs.get("HeliosChunkedSampler") or inputs["HeliosStreamVideo"]
        assert inputs["HeliosDiffusersLoader"]["folder"] == VALUES["folder"]
        assert inputs["HeliosTextEncode"]["positive"] == VALUES["positive"]
        assert [inputs["HeliosHistoryInjection"][key] for key in ("width", "height", "frames")] == [256, 384, 99]
        assert maker["seed"] == VALUES["seed"]
        loader = inputs["HeliosTextEncode"]["clip"][0]
        assert maker["schedule"] == [loader, 3]  # whatever the folder's variant
    assert page.errors == []
