"""Text from files, names and people on a real server: nothing of it runs in the page, or ends what runs graphs."""

import json
import os
import re
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from harness.browser import open_page, write_settings
from harness.client import PromptRejected, RunError, run_workflow
from harness.host import Host
from harness.models import make_tiny_models

SCRIPT = "<img src=x onerror=window.ran=1>"
SURROGATE = "caf\ud800"
LATIN_1 = os.fsdecode(b"caf\xe9")
WIDGET = """name => { const widget = app.graph.nodes.flatMap(node => node.widgets ?? []).find(w => w.name === name)
    const node = app.graph.nodes.find(node => node.widgets?.includes(widget)), {scale, offset} = app.canvas.ds
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return [canvas.x + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,
            canvas.y + (node.pos[1] + widget.last_y + 8 + offset[1]) * scale] }"""


def write_header(path, names):
    """A safetensors file with tensors of these names, one float each."""
    tensors = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    header = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(names)))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A server with names and files made to harm."""
    models = make_tiny_models(tmp_path_factory.mktemp("text_models"))
    base = tmp_path_factory.mktemp("text")
    folders = models / "diffusers"
    shutil.rmtree(folders / "Helios-Base")
    shutil.copytree(folders / "Helios-Mid", folders / SCRIPT)
    shutil.copytree(folders / "Helios-Mid", folders / LATIN_1)
    for name, value in (("shard", SURROGATE), ("shard_script", SCRIPT)):
        transformer = shutil.copytree(folders / "Helios-Mid", folders / name) / "transformer"
        index = {"weight_map": {"a": f"{value}.safetensors"}}
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    change(
        shutil.copytree(folders / "Helios-Mid", folders / "config") / "transformer" / "config.json", patch_size=SCRIPT
    )
    change(folders / "Helios-Mid" / "scheduler" / "scheduler_config.json", time_shift_type=SCRIPT)
    write_header(models / "diffusion_models" / "surrogate.safetensors", [SURROGATE])
    write_header(models / "diffusion_models" / "script.safetensors", [SCRIPT])
    weights = load_file(folders / "Helios-Mid" / "transformer" / "diffusion_pytorch_model.safetensors")
    config = (folders / "Helios-Mid" / "transformer" / "config.json").read_text()
    metadata = {"helios_config": config, "helios_variant": SCRIPT}
    save_file(weights, models / "diffusion_models" / "metadata.safetensors", metadata)
    write_header(models / "diffusion_models" / f"{SCRIPT}.safetensors", ["a"])
    write_settings(base)
    with Host(base, models=models) as host:
        (host.base / "input" / f"{SCRIPT}.txt").write_text("a fox")
        (host.base / "input" / "prompts.txt").write_text(
            f"{SCRIPT} & <b>snow</b> [[a|https://x.org]]\n__LNK0__ \x1b[2J"
        )
        yield host


def load_model(name):
    return {"class_type": "HeliosModelLoader", "inputs": {"model_name": name, "dtype": "auto"}}


def load_folder(name):
    return {"class_type": "HeliosDiffusersLoader", "inputs": {"folder": name, "dtype": "auto"}}


def prompt(index, file="prompts.txt"):
    return {"class_type": "HeliosPromptFromFile", "inputs": {"file": file, "index": index}}


def shown(node, output=0):
    """A graph that runs this node."""
    return {"1": node, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", output]}}}


UNENCODABLE = {
    "a file's name": load_model(f"{SURROGATE}.safetensors"),
    "a tensor's name": load_model("surrogate.safetensors"),
    "a folder's name": load_folder(SURROGATE),
    "a Latin-1 folder that is there": load_folder(LATIN_1),
    "a shard's name": load_folder("shard"),
}


@pytest.mark.parametrize("node", UNENCODABLE.values(), ids=UNENCODABLE)
def test_text_that_cannot_be_encoded_is_told_and_the_next_graph_runs(host, node):
    with pytest.raises(RunError, match=r"caf\\ud800|caf\\udce9") as caught:
        run_workflow(host.url, shown(node), timeout=30)
    str(caught.value).encode()
    assert run_workflow(host.url, shown(prompt(1)), timeout=30).outputs


LORA = {
    "class_type": "HeliosLoraLoader",
    "inputs": {"model": ["2", 0], "lora_name": "none.safetensors", "strength": 1.0},
}
NOT_THERE = {
    "a model": (
        load_model("none.safetensors"),
        "There is no model 'none.safetensors' in models/diffusion_models. Put it",
    ),
    "a folder": (
        load_folder("Helios-None"),
        "Put a copy of BestWishYsh/Helios-Distilled there",
    ),
    "a LoRA": (LORA, "There is no LoRA 'none.safetensors' in models/loras. Put it there"),
    "a prompt file": (prompt(0, "none.txt"), "Put a .txt file with one prompt per line there"),
}


@pytest.mark.parametrize("node, message", NOT_THERE.values(), ids=NOT_THERE)
def test_a_file_that_is_not_there_is_told_before_a_node_runs_and_in_our_words(host, node, message):
    """Newer hosts (0.24) have words of their own for it, which do not say what to do."""
    graph = {
        "1": node,
        "2": load_folder("Helios-Mid"),
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(PromptRejected, match=re.escape(message)):
        run_workflow(host.url, graph, timeout=30)


def test_no_list_of_options_holds_what_the_page_cannot_show(host):
    loader, folders, prompts = (
        host.get(f"/object_info/{name}")[name]["input"]["required"]
        for name in ("HeliosModelLoader", "HeliosDiffusersLoader", "HeliosPromptFromFile")
    )
    for widget in (loader["model_name"], folders["folder"], prompts["file"]):
        assert SCRIPT not in str(widget)
        str(widget).encode()
    assert "Helios-Mid" in folders["folder"][1]["options"]
    assert repr(f"{SCRIPT}.txt") + " is on no list" in host.log.read_text()


@pytest.fixture(scope="module")
def opened(browser, host):
    with open_page(browser, host.url) as page:
        yield page


SAYS = "text => document.body.innerText.replaceAll('\\u2060', '').includes(text)"  # a character that nobody sees


@pytest.fixture
def page(opened):
    """The page without a graph and without a message."""
    if opened.error_is_unfolded():  # it stays there
        opened.open()
    opened.page.keyboard.press("Escape")
    opened.page.evaluate("() => { app.graph.clear(); LiteGraph.closeAllContextMenus() }")
    opened.page.wait_for_function("() => !document.querySelector('[role=dialog], .litecontextmenu')")
    return opened


IN_THE_PAGE = {
    "a line of a prompt file": (shown(prompt(0)), "1 of 2: " + SCRIPT + " & <b>snow</b> [[a|https://x.org]]"),
    "a link's mark and an escape code": (shown(prompt(1)), r"2 of 2: __LNK0__ \x1b[2J"),
    "a value of a config": (shown(load_folder("Helios-Mid"), 3), SCRIPT),
    "a value of a transformer's config": (shown(load_folder("config")), SCRIPT),
    "a shard's name": (shown(load_folder("shard_script")), SCRIPT),
    "a tensor's name": (shown(load_model("script.safetensors")), SCRIPT),
    "a file's metadata": (shown(load_model("metadata.safetensors")), SCRIPT),
    "a file's name": (shown(load_model(f"{SCRIPT}.safetensors")), SCRIPT),
    "a prompt file's name": (shown(prompt(0, f"{SCRIPT}none.txt")), SCRIPT),
    "a name of a folder": (shown(load_folder(f"{SCRIPT}none")), SCRIPT),
}


@pytest.mark.browser
@pytest.mark.parametrize("graph, text", IN_THE_PAGE.values(), ids=IN_THE_PAGE)
def test_text_is_shown_as_text_and_nothing_of_it_runs(page, graph, text):
    assert text not in page.page.inner_text("body")
    page.load_api(graph)
    if page.run()["kind"] != "execution_success":
        page.unfold_error()
    page.page.wait_for_function(SAYS, arg=text, timeout=10_000)
    page.page.wait_for_timeout(200)  # an image that cannot be loaded says so a moment later
    assert page.page.evaluate("window.ran") is None
    assert page.errors == []


@pytest.mark.browser
@pytest.mark.parametrize(
    "node, widget",
    [(load_model("script.safetensors"), "model_name"), (load_folder("Helios-Mid"), "folder"), (prompt(0), "file")],
)
def test_an_open_list_of_names_runs_nothing(page, node, widget):
    page.load_api(shown(node))
    page.fit()
    page.page.mouse.click(*page.page.evaluate(WIDGET, widget))
    page.page.wait_for_selector(".litecontextmenu")
    page.page.wait_for_timeout(200)
    assert page.page.evaluate("window.ran") is None
