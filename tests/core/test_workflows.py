"""What our workflows tell a page beside the graph: packs, addresses of models, an app; and the blueprints of them."""

import re
import runpy

import pytest

from harness.small import ROOT, WORKFLOWS, read_workflow

# Who loads a model, and its folder. One that is downloaded as it is has an address in the node, any other a note.
ADDRESSED = {"CLIPLoader": "text_encoders", "VAELoader": "vae"}
NOTED = {
    "HeliosDiffusersLoader": "diffusers",
    "HeliosModelLoader": "diffusion_models",
    "UpscaleModelLoader": "upscale_models",
}
STAMPED = runpy.run_path(str(ROOT / "scripts" / "stamp_workflows.py"))["stamped"]
BLUEPRINTS = runpy.run_path(str(ROOT / "scripts" / "make_blueprints.py"))
FILES = [path.stem for path in WORKFLOWS]


def nodes(name):
    return read_workflow(name)["nodes"]


@pytest.mark.parametrize("name", FILES)
def test_every_node_tells_its_pack_and_version(name):
    text = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    assert text == STAMPED(text), "run `python scripts/stamp_workflows.py`"
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
        elif not node["widgets_values"][0].startswith("Helios-Tiny"):  # which comes with the pack
            assert NOTED[node["type"]] in notes, f"no note says where {node['type']} finds its model"


@pytest.mark.parametrize("name", FILES)
def test_each_opening_is_a_workflow_of_its_own(name):
    """By its id the page would know the newest live video of whoever has opened the same file."""
    assert "id" not in read_workflow(name)


@pytest.mark.parametrize("name", FILES)
def test_a_note_can_be_read_on_its_yellow_node(name):
    """Nodes 2.0 (1.49) writes `code` within a line in blue on blue there; a block of code is white."""
    notes = [node["widgets_values"][0] for node in nodes(name) if node["type"] == "MarkdownNote"]
    assert [note for note in notes if "`" in re.sub(r"```.*?```", "", note, flags=re.DOTALL)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_workflow_is_an_app_too(name):
    app = read_workflow(name)["extra"]["linearData"]
    kinds = {node["id"]: node["type"] for node in nodes(name)}
    assert [kinds[node] for node in app["outputs"]] == ["SaveVideo"]
    shown = [widget for _, widget in app["inputs"]]
    assert [shown.count(widget) for widget in ("width", "height", "seed")] == [1, 1, 1]


@pytest.mark.parametrize("blueprint", BLUEPRINTS["BLUEPRINTS"], ids=lambda blueprint: blueprint.name)
def test_a_blueprint_is_that_of_its_workflow(blueprint):
    text = (ROOT / "subgraphs" / f"{blueprint.name}.json").read_text(encoding="ascii")
    assert text == BLUEPRINTS["made"](blueprint), "run `python scripts/make_blueprints.py`"
