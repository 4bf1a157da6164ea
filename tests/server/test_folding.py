"""In ComfyUI's page, what few people set is folded away on our nodes, and is there all the same."""

import pytest

from harness.small import FIRST_RUN, read_workflow

pytestmark = pytest.mark.browser
SHOWN = """type => { const node = app.graph.nodes.find(node => node.type === type)
    const shown = widget => (node.isWidgetRowVisible ?? node.isWidgetVisible).call(node, widget)
    return {names: node.widgets.filter(shown).map(widget => widget.name),
            height: node.size[1]} }"""
TOGGLE = "type => app.graph.nodes.find(node => node.type === type).toggleAdvanced()"
LINK = """name => { const node = app.graph.nodes.find(node => node.type === 'HeliosHistoryInjection')
    const float = LiteGraph.createNode('PrimitiveFloat')
    app.graph.add(float)
    float.connect(0, node, node.inputs.findIndex(input => input.name === name)) }"""
NODE = "HeliosHistoryInjection"
ALWAYS = ["width", "height", "frames", "batch_size"]
ADVANCED = [
    *("fit", "skip_first_chunk", "keep_first_frame", "add_noise"),
    *("image_sigma_min", "image_sigma_max", "video_sigma_min", "video_sigma_max"),
    *("history_long", "history_mid", "history_short"),
]


@pytest.fixture
def opened(used_page):
    """The page with the first workflow in it, all of whose advanced widgets have values of their own."""
    workflow = read_workflow(FIRST_RUN)
    [node] = [node for node in workflow["nodes"] if node["type"] == NODE]
    node["widgets_values"][4:] = ["pad", True, False, False, 0.2, 0.3, 0.4, 0.5, 17, 3, 2]
    used_page.load(workflow)
    return used_page


def shown(page):
    page.page.wait_for_timeout(300)  # until it is drawn: the page makes room for all that it draws
    return page.page.evaluate(SHOWN, NODE)


def test_advanced_widgets_fold_away_and_keep_their_values(opened):
    folded = shown(opened)
    assert folded == {"names": ALWAYS, "height": 230}
    values = opened.to_api()["13"]["inputs"]
    assert (values["fit"], values["image_sigma_min"], values["history_short"]) == ("pad", 0.2, 2)

    opened.page.evaluate(TOGGLE, NODE)
    unfolded = shown(opened)
    assert unfolded["names"] == ALWAYS + ADVANCED
    assert unfolded["height"] > 450
    assert opened.to_api()["13"]["inputs"] == values
    opened.page.evaluate(TOGGLE, NODE)
    assert shown(opened)["names"] == ALWAYS
    assert opened.errors == []


def test_a_folded_widget_comes_into_sight_when_something_is_connected_to_it(opened):
    opened.page.evaluate(LINK, "image_sigma_min")
    assert shown(opened)["names"] == [*ALWAYS, "image_sigma_min"]


def test_the_page_learns_which_inputs_are_advanced(server):
    inputs = server.get("/object_info")[NODE]["input"]["optional"]
    assert [name for name, (_, options) in inputs.items() if options.get("advanced")] == ADVANCED
