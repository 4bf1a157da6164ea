"""A file that the converter has quantised, in graphs on a real server that is asked to free memory in between."""

import convert_checkpoint
import pytest
import torch
from safetensors.torch import load_file

from harness.client import run_workflow
from harness.small import find, small_api, with_latents
from harness.tiny import make_transformer


@pytest.fixture(scope="module")
def scaled(files, tmp_path_factory):
    """Name of a model file in scaled fp8."""
    folder = tmp_path_factory.mktemp("scaled")
    make_transformer(5).save_pretrained(folder / "transformer")
    target = files / "diffusion_models" / "helios_fp8_scaled.safetensors"
    options = ["--variant", "distilled", "--quant", "fp8_scaled", "--keep"]
    assert convert_checkpoint.main([str(folder), str(target), *options]) == 0
    return target.name


def latents(server, info, scaled, **loader):
    name = f"scaled/{'_'.join(loader.values())}"
    api = with_latents(small_api("helios_t2v_distilled_files", info, model_name=scaled, seed=4), name)
    api[find(api, "HeliosModelLoader")]["inputs"] |= loader
    [file] = run_workflow(server.url, api).files()
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"]


def test_scaled_fp8_gives_the_same_latents_before_and_after_memory_is_freed(server, info, scaled):
    expected = latents(server, info, scaled, group_offload="off", dtype="fp32")
    for level in ("off", "block"):
        server.post("/free", {"unload_models": True, "free_memory": True})
        assert torch.equal(latents(server, info, scaled, group_offload=level, dtype="fp32"), expected)
