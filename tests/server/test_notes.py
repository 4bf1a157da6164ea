"""What a node has said stays on it in ComfyUI's page, and on the subgraph that it is in."""

import json

import pytest
from make_blueprints import find

from harness.browser import open_page
from harness.small import FIRST_RUN, ROOT, read_workflow

pytestmark = pytest.mark.browser
NODE = "HeliosHistoryInjection"
NOTE = "$$node-text-preview"
NOTHING = "\u2060"
NO_ID = "00000000-0000-0000-0000-000000000000"  # which older pages (1.32) give to every graph that was emptied
# As the server tells the page.
SAY = "([nodeId, text]) => app.api.dispatchCustomEvent('progress_text', {nodeId, text})"
TELL = "([event, detail]) => app.api.dispatchCustomEvent(event, detail)"
# Of the nodes in the graph that is open, when all is done that waits for the page.
NOTES = """async name => {
    await new Promise(done => setTimeout(done))
    const widgets = app.canvas.graph.nodes.flatMap(node => node.widgets ?? [])
    return widgets.filter(widget => widget.name === name).map(widget => widget.value) }"""
# The end of a run, and what newer pages (1.58) do then.
END = """name => {
    for (const node of app.graph.nodes) {
        const index = node.widgets?.findIndex(widget => widget.name === name) ?? -1
        if (index < 0) continue
        node.widgets[index].onRemove?.()
        node.widgets.splice(index, 1)
    }
    app.api.dispatchCustomEvent('execution_success', {prompt_id: 'one of before'}) }"""
OPEN = """() => { const node = app.graph.nodes.find(node => node.subgraph)
    app.canvas.openSubgraph(node.subgraph, node) }"""
CLOSE = "() => app.canvas.setGraph(app.rootGraph ?? app.graph)"
VALUES = "() => app.graph.serialize().nodes[0].widgets_values"
TAB = "() => app.extensionManager.workflow.activeWorkflow.path"
SWITCH = """path => { const tab = app.extensionManager.workflow.getWorkflowByPath(path)
    return app.loadGraphData(tab.activeState, true, true, tab) }"""

IN_SIGHT = """text => [...document.querySelectorAll('.dom-widget')].some(widget => {
    if (!widget.innerText.includes(text)) return false
    const words = document.createRange()
    words.selectNodeContents(widget)
    return words.getBoundingClientRect().bottom <= widget.getBoundingClientRect().bottom + 1 })"""


@pytest.fixture(scope="module")
def shared_page(browser, server):
    """In which nothing has run: what is said is of the run before."""
    with open_page(browser, server.url) as page:
        yield page


def say(page, ids, text):
    page.page.evaluate(SAY, [str(ids), text])


def notes(page):
    return page.page.evaluate(NOTES, NOTE)


def blueprint(name):
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="ascii"))


def test_until_the_node_takes_it_back(used_page):
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    ids = find(workflow["nodes"], NODE)["id"]
    say(used_page, ids, "What it says.")
    used_page.page.evaluate(END, NOTE)
    assert notes(used_page) == ["What it says."]
    say(used_page, ids, NOTHING)
    used_page.page.evaluate(END, NOTE)
    assert notes(used_page) == []


def test_until_the_node_runs_again(used_page):
    """The server takes it back too, unless a node of that number in another workflow has had nothing to say since."""
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    ids = str(find(workflow["nodes"], NODE)["id"])
    for run in ("one", "another"):
        used_page.page.evaluate(TELL, ["execution_start", {"prompt_id": run}])
        used_page.page.evaluate(TELL, ["executing", ids])
        assert notes(used_page) == []
        say(used_page, ids, "What it says.")
        used_page.page.evaluate(TELL, ["executing", ids])  # as on a connection that is made again
        assert notes(used_page) == ["What it says."]


def test_on_no_other_node_of_its_number(page):
    workflow = blueprint("Helios Text to Video")
    inside = find(workflow["definitions"]["subgraphs"][0]["nodes"], NODE)
    unconnected = {
        "inputs": [{**entry, "link": None} for entry in inside["inputs"]],
        "outputs": [{**entry, "links": []} for entry in inside["outputs"]],
    }
    page.load({**workflow, "nodes": [*workflow["nodes"], {**inside, **unconnected}], "last_node_id": inside["id"]})
    say(page, inside["id"], "What the outer one says.")
    assert notes(page) == ["What the outer one says."]
    page.page.evaluate(OPEN)
    page.page.evaluate(END, NOTE)
    assert notes(page) == []


def test_on_the_subgraph_around_it_and_within(page):
    workflow = blueprint("Helios Minute into a File")
    page.load(workflow)
    values = page.page.evaluate(VALUES)
    [outer] = workflow["nodes"]
    inside = workflow["definitions"]["subgraphs"][0]["nodes"]
    first, second = (f"{outer['id']}:{find(inside, kind)['id']}" for kind in (NODE, "HeliosStreamVideo"))
    say(page, first, "What one says.")
    say(page, second, "What another says.")
    assert notes(page) == ["What one says.\nWhat another says."]
    assert page.page.evaluate(VALUES) == values
    page.page.evaluate(OPEN)
    assert notes(page) == ["What one says.", "What another says."]
    say(page, first, NOTHING)
    assert notes(page) == ["What another says."]
    page.page.evaluate(CLOSE)
    assert notes(page) == ["What another says."]
    page.page.get_by_text("What another says.").filter(visible=True).wait_for()
    say(page, second, NOTHING)
    assert notes(page) == []
    say(page, second, "What it says then.")
    page.page.get_by_text("What it says then.").filter(visible=True).wait_for()


def test_what_others_say_on_a_subgraph_stays(page):
    workflow = blueprint("Helios Text to Video")
    page.load(workflow)
    say(page, workflow["nodes"][0]["id"], "What somebody says.")
    page.page.evaluate(TELL, ["execution_success", {"prompt_id": "one of before"}])
    assert "What somebody says." in notes(page)


@pytest.mark.parametrize("text", ["What it says has some lines. " * 8, "它说的话有好几行。" * 44], ids=["en", "zh"])
def test_all_of_a_long_one_can_be_read(used_page, text):
    """The page has two lines for it, and the rest only for those who scroll."""
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    say(used_page, find(workflow["nodes"], NODE)["id"], text)
    used_page.page.wait_for_function(IN_SIGHT, arg=text.strip(), timeout=15_000)


def test_with_its_workflow_and_no_other_one(used_page):
    """Whose nodes have the same numbers."""
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    tab = used_page.page.evaluate(TAB)
    say(used_page, find(workflow["nodes"], NODE)["id"], "What it says.")
    used_page.load(workflow)
    assert notes(used_page) == []
    used_page.page.evaluate(SWITCH, tab)
    assert notes(used_page) == ["What it says."]


def test_on_none_where_no_workflow_has_an_id_of_its_own(used_page):
    workflow = read_workflow(FIRST_RUN) | {"id": NO_ID}
    used_page.load(workflow)
    say(used_page, find(workflow["nodes"], NODE)["id"], "What it says.")
    used_page.load(workflow)
    assert notes(used_page) == []


def test_of_a_run_whose_workflow_is_not_open(used_page):
    workflow = read_workflow(FIRST_RUN)
    used_page.load(workflow)
    tab = used_page.page.evaluate(TAB)
    answer = {"prompt_id": "one that was queued here", "number": 1, "node_errors": {}}
    used_page.page.route("**/prompt", lambda route: route.fulfill(json=answer))
    used_page.page.evaluate("() => app.queuePrompt(0)")
    used_page.page.unroute("**/prompt")
    used_page.load(workflow)
    used_page.page.evaluate(TELL, ["execution_start", answer])
    say(used_page, find(workflow["nodes"], NODE)["id"], "What it says.")
    assert notes(used_page) == []
    used_page.page.evaluate(SWITCH, tab)
    assert notes(used_page) == ["What it says."]
