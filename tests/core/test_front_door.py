"""What a script without ComfyUI calls: a transformer from a repository, and a video of it."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from comfyui_helios.helios_core import generate as loop
from comfyui_helios.helios_core.loading import load_transformer
from comfyui_helios.helios_core.predict import bind_transformer
from comfyui_helios.helios_core.schedule import BASE
from harness import oracle
from harness.errors import difference
from support.videos import CASES, TOLERANCE, our_video, reference_video

EXAMPLE = Path(__file__).resolve().parents[2] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Helios-Tiny")
    oracle.transformer(0).save_pretrained(folder / "transformer")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["base unipc guided", "mid", "distilled 2, 2, 2 amplified"])
def test_a_video_of_a_repository_equals_the_reference(repository, name):
    case, prompts = CASES[name], oracle.prompts()
    video = our_video(case, bind_transformer(load_transformer(repository, torch.float32), case.schedule, *prompts))
    assert difference(video, reference_video(case, oracle.transformer(0), *prompts)) <= TOLERANCE


def test_guidance_without_a_negative_prompt_is_refused(repository):
    with pytest.raises(ValueError, match=r"guidance_scale 5\.0 needs a negative prompt"):
        bind_transformer(load_transformer(repository, torch.float32), BASE, oracle.prompts()[0])


def test_the_example_runs_as_it_is(repository, tmp_path, monkeypatch):
    """At a small size: its own takes minutes on a CPU."""
    prompt, out = tmp_path / "prompt.npy", tmp_path / "out.npy"
    np.save(prompt, oracle.prompts()[0].numpy())
    small = loop.Memory.empty
    monkeypatch.setattr(loop.Memory, "empty", lambda batch, height, width: small(batch, height // 6, width // 5))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(repository), str(prompt), str(out)])
    runpy.run_path(str(EXAMPLE))
    latents = np.load(out)
    assert latents.shape == (1, 16, 8 * 9, 8, 16)
    assert np.isfinite(latents).all() and latents.std() > 0.1
