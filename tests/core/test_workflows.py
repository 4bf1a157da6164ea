"""What a workflow of ours tells a page that has not all of it: the packs of its nodes, and its models' addresses."""

import json
import re
import runpy

import pytest

from harness.small import ROOT, WORKFLOWS

# Who loads a model, and its folder. One that is downloaded as it is has an address in the node, any other a note.
ADDRESSED = {"CLIPLoader": "text_encoders", "VAELoader": "vae"}
NOTED = {
    "HeliosDiffusersLoader": "models/diffusers",
    "HeliosModelLoader": "models/diffusion_models",
    "UpscaleModelLoader": "models/upscale_models",
}
STAMP = runpy.run_path(str(ROOT / "scripts" / "stamp_workflows.py"))
FILES = [path.relative_to(ROOT).as_posix() for path in STAMP["workflow_files"]()]


def nodes(name):
    return list(STAMP["all_nodes"](json.loads((ROOT / name).read_text(encoding="utf-8"))))


def test_all_workflows_are_looked_at():
    assert {path.relative_to(ROOT).as_posix() for path in WORKFLOWS} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_node_tells_its_pack_and_version(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == STAMP["stamped"](text), "run `python scripts/stamp_workflows.py`"
    told = {node["properties"].get("cnr_id") for node in nodes(name) if node["type"].startswith("Helios")}
    assert told == {"helios-video"}


@pytest.mark.parametrize("name", FILES)
def test_a_model_that_can_be_downloaded_has_its_address_and_every_other_one_a_note(name):
    notes = "".join(node["widgets_values"][0] for node in nodes(name) if node["type"] == "MarkdownNote")
    loaders = [node for node in nodes(name) if node["type"] in {**ADDRESSED, **NOTED}]
    assert loaders
    for node in loaders:
        if folder := ADDRESSED.get(node["type"]):
            [model] = node["properties"]["models"]
            assert (model["name"], model["directory"]) == (node["widgets_values"][0], folder)
            assert re.fullmatch(rf"https://huggingface\.co/.+/resolve/main/.+/{re.escape(model['name'])}", model["url"])
        else:
            assert NOTED[node["type"]] in notes, f"no note says where {node['type']} finds its model"
