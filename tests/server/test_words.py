"""In a page that is in another language, our nodes and their help are too."""

import json
import urllib.request

import pytest

from harness.browser import open_page
from harness.small import FIRST_RUN, ROOT, read_workflow

CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
SPEAK = "async language => { await app.extensionManager.setting.set('Comfy.Locale', language) }"
LABELS = """() => app.graph.nodes.filter(node => node.type.startsWith('Helios')).map(node => [node.type, node.title,
    Object.fromEntries(node.widgets.map(widget => [widget.name, widget.label])),
    Object.fromEntries(node.inputs.map(input => [input.name, input.localized_name])),
    node.outputs.map(output => output.localized_name)])"""


@pytest.mark.browser
def test_every_title_widget_and_socket_is_chinese(browser, server):
    with open_page(browser, server.url) as page:
        page.page.evaluate(SPEAK, "zh")
        try:
            page.open()
            page.load(read_workflow(FIRST_RUN))
            for kind, title, widgets, inputs, outputs in page.page.evaluate(LABELS):
                words = CHINESE[kind]
                names = {name: told["name"] for name, told in words["inputs"].items()}
                assert title == words["display_name"]
                assert names.items() >= {(name, inputs[name]) for name in names}
                assert {name: widgets[name] for name in names if name in widgets}.items() <= names.items()
                assert outputs == [told["name"] for told in words["outputs"].values()]
        finally:
            page.page.evaluate(SPEAK, "en")
        assert page.errors == []


@pytest.mark.parametrize("page", ["HeliosTextEncode.md", "HeliosTextEncode/zh.md"])
def test_the_server_has_the_help_and_its_picture(server, page):
    docs = f"{server.url}/extensions/ComfyUI-Helios/docs"
    with urllib.request.urlopen(f"{docs}/{page}") as answer:
        text = answer.read().decode()
    picture = text.partition("](")[2].partition(")")[0]
    with urllib.request.urlopen(f"{docs}/{picture}") as answer:
        assert answer.read() == (ROOT / "web" / "docs" / picture).read_bytes()
