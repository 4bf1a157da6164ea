"""The guider after a run, whichever way it ended: as it was, with the memory that a next chunk follows on."""

from dataclasses import replace

import comfy.model_management
import pytest
import torch

from comfyui_helios.helios_core.generate import Run
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.sampling.guider import HeliosGuider
from harness import oracle
from support.runs import QUICK

CHUNKS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.transformer(0).save_pretrained(path / "transformer")
    return load_model(str(path / "transformer"), "fp32")


@pytest.fixture
def guider(model):
    guider = HeliosGuider(model, Run(QUICK, Memory.empty(1, 8, 8), CHUNKS, torch.Generator().manual_seed(0)))
    guider.set_conds(*([[prompt, {}]] for prompt in oracle.prompts()))
    return guider


def test_what_is_loaded_beside_is_loaded_in_that_run_only(model, guider, monkeypatch):
    loaded = []
    load = comfy.model_management.load_models_gpu

    def load_models(models, *args, **kwargs):
        loaded.append(models)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models)
    other = model.clone()
    for beside in ([other], [other], []):
        guider.denoise(lambda chunk: None, beside)
    assert [models.count(other) for models in loaded] == [2, 2, 0]  # once for each prompt


@pytest.mark.parametrize("ends", ["well", "interrupted"])
def test_memory_leaves_the_device(guider, monkeypatch, ends):
    """To a CPU only the call tells."""
    moved, finished = [], []
    to = Memory.to

    def watched(self, device):
        moved.append((to(self, device), device))
        return moved[-1][0]

    def on_chunk(chunk):
        finished.append(chunk)
        if ends == "interrupted":
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(Memory, "to", watched)
    if ends == "interrupted":
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            guider.denoise(on_chunk)
    else:
        guider.denoise(on_chunk)
    memory, device = moved[-1]
    assert guider.memory is memory and str(device) == "cpu"
    assert torch.equal(memory.latents, finished[-1].memory.latents)


def test_each_step_is_told(guider):
    steps = []
    guider.run = replace(guider.run, schedule=replace(QUICK, steps=(1, 2, 1)))
    guider.denoise(lambda chunk: None, on_step=lambda: steps.append(None))
    assert len(steps) == 4 * CHUNKS
