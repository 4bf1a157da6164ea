"""The key of a graph: it changes with whatever changes latents, and with nothing else."""

import copy
import os

import folder_paths
import pytest

from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream.graph_key import graph_key
from support.streams import GRAPH, graph


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files that GRAPH names: an input and an official folder."""
    inputs, models = tmp_path / "input", tmp_path / "models" / "diffusers"
    for path in (
        inputs / "start.png",
        models / "Helios-Distilled" / "transformer" / "weights.safetensors",
        models / "Helios-Distilled" / "transformer_ode" / "weights.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    (models / "Helios-Distilled" / "transformer" / "config.json").write_text("{}")
    (models / "Helios-Distilled" / "model_index.json").write_text("{}")
    monkeypatch.setattr(folder_paths, "input_directory", str(inputs))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(models)], {"folder"}))
    loras = tmp_path / "models" / "loras"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    (loras / "style").mkdir(parents=True)
    (loras / "style" / "ink.safetensors").write_bytes(b"1234")
    return tmp_path


def renumber(prompt):
    """The same graph with other node ids in another order."""

    def link(value):
        return [f"9{value[0]}", value[1]] if isinstance(value, list) else value

    renamed = {
        f"9{node}": {**entry, "inputs": {name: link(value) for name, value in entry["inputs"].items()}}
        for node, entry in prompt.items()
    }
    return dict(reversed(renamed.items()))


def test_ids_order_titles_and_what_is_elsewhere_do_not_count(files):
    key = graph_key(GRAPH, "5")
    assert run_folder.KEY.fullmatch(key)
    assert graph_key(renumber(GRAPH), "95") == key
    titled = copy.deepcopy(GRAPH)
    titled["2"]["_meta"] = {"title": "Prompt"}
    titled["2"]["is_changed"] = "something of the host's"
    titled["6"]["inputs"]["filename_prefix"] = "video/other"
    assert graph_key(titled, "5") == key


@pytest.mark.parametrize(
    "inputs",
    [
        {"fps": 12.0},
        {"crf": 30},
        {"bit_depth": "10"},
        {"trim": True},
        {"drop_first": 3},
        {"resume": False},
        {"overlap_decode": "off"},
        {"vae": ["7", 0]},
        {"live": True},
        {"clip": ["1", 1]},
        {"until_finished": True},
    ],
)
def test_what_does_not_change_latents_does_not_count(files, inputs):
    assert graph_key(graph(**inputs), "5") == graph_key(GRAPH, "5")


def test_offloading_does_not_count(files):
    offloaded = copy.deepcopy(GRAPH)
    offloaded["1"]["inputs"] |= {"group_offload": "leaf", "blocks_per_group": 2, "weights_in": "disk"}
    assert graph_key(offloaded, "5") == graph_key(GRAPH, "5")


def test_how_long_a_step_on_several_cards_may_take_does_not_count(files):
    """The error of one that took longer says to set it to more: the next run is to go on from what is saved."""

    def patient(seconds):
        inputs = {"model": ["1", 0], "cards": 2, "timeout": seconds, "address": ""}
        return {**graph(model=["7", 0]), "7": {"class_type": "HeliosMultiGPU", "inputs": inputs}}

    assert graph_key(patient(0), "5") == graph_key(patient(600), "5")


def change(node, name, value):
    def apply(prompt):
        prompt[node]["inputs"][name] = value

    return apply


def with_lora(prompt):
    prompt["7"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["1", 0], "lora_name": "style/ink.safetensors", "strength_model": 1.0},
    }
    prompt["5"]["inputs"]["model"] = ["7", 0]


@pytest.mark.parametrize(
    "apply",
    [
        change("5", "seed", 4),
        change("5", "seed_mode", "new"),
        change("5", "negative", ["4", 0]),
        change("4", "frames", 165),
        change("2", "positive", "A blue fox."),
        change("1", "dtype", "fp32"),
        change("1", "folder", "Helios-Mid"),
        change("3", "image", "other.png"),
        with_lora,
    ],
)
def test_what_is_upstream_counts(files, apply):
    changed = copy.deepcopy(GRAPH)
    apply(changed)
    assert graph_key(changed, "5") != graph_key(GRAPH, "5")


OFFICIAL = "models/diffusers/Helios-Distilled"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("input/start.png", True),
        ("models/loras/style/ink.safetensors", True),
        (f"{OFFICIAL}/transformer/weights.safetensors", True),
        (f"{OFFICIAL}/model_index.json", True),
        (f"{OFFICIAL}/transformer_ode/weights.safetensors", False),
        (f"{OFFICIAL}/.cache/refs", False),
    ],
)
@pytest.mark.parametrize("how", ["size", "time"])
def test_files_count_by_size_and_time(files, name, counts, how):
    prompt = copy.deepcopy(GRAPH)
    with_lora(prompt)
    path = files / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1234")
    before = graph_key(prompt, "5")
    status = path.stat()
    if how == "size":
        path.write_bytes(b"12345")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert (graph_key(prompt, "5") != before) == counts


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("start.png", "input/start.png"),
        ("start.png [input]", "input/start.png"),
        ("start.png [output]", "start.png"),
        ("../start.png", "start.png"),  # the host's own nodes refuse this and the next; some others read them
        ("{files}/start.png", "start.png"),
    ],
)
def test_a_file_may_be_named_in_every_way_that_nodes_read(files, text, named):
    prompt = copy.deepcopy(GRAPH)
    prompt["3"]["inputs"]["image"] = text.format(files=files)
    path = files / named
    path.write_bytes(b"1234")
    before = graph_key(prompt, "5")
    path.write_bytes(b"12345")
    assert graph_key(prompt, "5") != before


@pytest.mark.parametrize(
    "inputs", [{"file": "prompts.txt", "index": 0}, {"files": [["prompts.txt", 0], ["prompts.txt", 1]]}]
)
def test_a_file_counts_beside_one_number(files, inputs):
    """Helios Prompt From File has a text and a number, as a link has; other nodes have lists of such pairs."""
    prompt = copy.deepcopy(GRAPH)
    prompt["7"] = {"class_type": "HeliosPromptFromFile", "inputs": inputs}
    prompt["2"]["inputs"]["positive"] = ["7", 0]
    path = files / "input" / "prompts.txt"
    path.write_text("A red fox.")
    before = graph_key(prompt, "5")
    path.write_text("A blue fox.")
    assert graph_key(prompt, "5") != before


def test_texts_of_all_kinds_are_no_files(files):
    for text in (
        "",
        ".",
        "..",
        "../..",
        "a\0b",
        "x" * 100_000,
        "\n",
        "~",
        "ümläut",
        {"nested": ["", {"a": "start.png"}]},
    ):
        prompt = copy.deepcopy(GRAPH)
        prompt["2"]["inputs"]["positive"] = text
        assert run_folder.KEY.fullmatch(graph_key(prompt, "5"))


def test_a_node_that_is_not_there_has_no_key(files):
    with pytest.raises(KeyError):
        graph_key(GRAPH, "55")


def test_texts_that_look_like_paths_and_links_to_nothing(files, monkeypatch):
    """On Windows the host raises for a text that begins with another drive; cut-off downloads leave broken links."""

    def windows(kind, text):
        raise ValueError("path is on mount 'A:', start on mount 'C:'")

    (files / "models" / "diffusers" / "Helios-Distilled" / "transformer" / "missing.safetensors").symlink_to("nowhere")
    monkeypatch.setattr(folder_paths, "get_full_path", windows)
    assert run_folder.KEY.fullmatch(graph_key(GRAPH, "5"))
