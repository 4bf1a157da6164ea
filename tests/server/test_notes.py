"""What a node has said stays on it in ComfyUI's page when a run has ended."""

import json

import pytest

from harness.small import FIRST_RUN, ROOT, read_workflow

pytestmark = pytest.mark.browser
NODE = "HeliosHistoryInjection"
NOTE = "$$node-text-preview"
NOTHING = "\u2060"
# As the server tells the page.
SAY = "([nodeId, text]) => app.api.dispatchCustomEvent('progress_text', {nodeId, text})"
# Of the nodes in the graph that is open.
NOTES = (
    "name => app.canvas.graph.nodes.flatMap(node => node.widgets ?? []).filter(w => w.name === name).map(w => w.value)"
)
# The end of a run, and what newer pages (1.58) do then.
END = """name => {
    for (const node of app.graph.nodes) {
        const index = node.widgets?.findIndex(widget => widget.name === name) ?? -1
        if (index < 0) continue
        node.widgets[index].onRemove?.()
        node.widgets.splice(index, 1)
    }
    app.api.dispatchCustomEvent('execution_success', {prompt_id: 'one of before'})
    return new Promise(resolve => setTimeout(resolve, 200)) }"""
OPEN = """() => { const node = app.graph.nodes.find(node => node.subgraph)
    app.canvas.openSubgraph(node.subgraph, node) }"""


def the(kind, nodes):
    [node] = [node for node in nodes if node["type"] == kind]
    return node


def test_until_the_node_takes_it_back(used_page):
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    ids = str(the(NODE, workflow["nodes"])["id"])
    used_page.page.evaluate(SAY, [ids, "What it says."])
    used_page.page.evaluate(END, NOTE)
    assert used_page.page.evaluate(NOTES, NOTE) == ["What it says."]
    used_page.page.evaluate(SAY, [ids, NOTHING])
    used_page.page.evaluate(END, NOTE)
    assert used_page.page.evaluate(NOTES, NOTE) == []


def test_on_no_other_node_of_its_number(used_page):
    workflow = json.loads((ROOT / "subgraphs" / "Helios Text to Video.json").read_text(encoding="ascii"))
    inside = the(NODE, workflow["definitions"]["subgraphs"][0]["nodes"])
    unconnected = {
        "inputs": [{**entry, "link": None} for entry in inside["inputs"]],
        "outputs": [{**entry, "links": []} for entry in inside["outputs"]],
    }
    used_page.load({**workflow, "nodes": [*workflow["nodes"], {**inside, **unconnected}], "last_node_id": inside["id"]})
    used_page.page.evaluate(SAY, [str(inside["id"]), "What the outer one says."])
    assert used_page.page.evaluate(NOTES, NOTE) == ["What the outer one says."]
    used_page.page.evaluate(OPEN)
    used_page.page.evaluate(END, NOTE)
    assert used_page.page.evaluate(NOTES, NOTE) == []
