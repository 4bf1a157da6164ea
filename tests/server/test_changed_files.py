"""A model file that is replaced while a server has it loaded: the next run loads it anew and joins no old chunks."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from harness.client import ExecutionFailed, run_workflow
from harness.small import find, small_api
from harness.tiny import make_transformer

NODE = "HeliosStreamVideo"


@pytest.fixture
def changing(models):
    """A folder of a model of its own."""
    return shutil.copytree(models / "diffusers" / "Helios-Distilled", models / "diffusers" / "Helios-Changing")


def replace_transformer(changing, seed):
    folder = changing / "transformer"
    make_transformer(seed).save_pretrained(folder.with_name("new"))
    for file in folder.with_name("new").iterdir():
        file.replace(folder / file.name)
    folder.with_name("new").rmdir()


def test_a_replaced_model_is_loaded_anew_and_its_chunks_stay_apart(server, info, changing):
    def tail(on_event=None, **inputs):
        """The last chunk of the streamed video; which nodes ran."""
        api = small_api("helios_stream", info, folder=changing.name, frames=99, seed=5, **inputs)
        api["tail"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [find(api, NODE), 1], "filename_prefix": "tail"},
        }
        run = run_workflow(server.url, api, on_event=on_event)
        [file] = [x for x in run.files() if x["filename"].endswith(".latent")]
        ran = {api[node]["class_type"] for node in run.executed()}
        return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"], ran

    old, _ = tail(resume=True)
    _, ran = tail(resume=True, crf=30)
    assert "HeliosDiffusersLoader" not in ran  # nothing has changed: what is loaded stays

    replace_transformer(changing, seed=50)
    new, ran = tail(resume=True)
    assert "HeliosDiffusersLoader" in ran
    assert (new - old).abs().max() > 1e-3
    assert torch.equal(tail(resume=False)[0], new)

    def replace_it(event):
        if event.kind == "progress" and event.data["value"] == 1:
            replace_transformer(changing, seed=60)

    with pytest.raises(ExecutionFailed, match="has changed since the model was loaded.*Run the graph again"):
        tail(replace_it, resume=False, seed_mode="new")
    newest, ran = tail(resume=True)
    assert "HeliosDiffusersLoader" in ran
    assert torch.equal(tail(resume=False)[0], newest)
    assert (newest - new).abs().max() > 1e-3
