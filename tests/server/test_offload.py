"""Group offloading switched on and off in graphs on a real server, on layers that are large enough to travel."""

import convert_checkpoint
import pytest
import torch
from safetensors.torch import load_file

from harness.client import run_workflow
from harness.small import find, small_api, with_latents
from harness.tiny import make_transformer

WIDE = 12_000  # a feed-forward matrix of 1.2 MB in bf16


@pytest.fixture(scope="module")
def wide(server, files, tmp_path_factory):
    """Name of a model file with some layers above a megabyte."""
    folder = tmp_path_factory.mktemp("wide")
    make_transformer(5, ffn_dim=WIDE).save_pretrained(folder / "transformer")
    target = files / "diffusion_models" / "helios_wide_bf16.safetensors"
    assert convert_checkpoint.main([str(folder), str(target), "--variant", "distilled"]) == 0
    return target.name


def latents(server, api):
    [file] = run_workflow(server.url, api).files()
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"]


def graph(info, wide, **settings):
    return with_latents(small_api("helios_t2v_distilled_files", info, model_name=wide, seed=4, **settings), "offload")


def test_same_latents_switched_on_and_off(server, info, wide):
    expected = latents(server, graph(info, wide))
    for level, place in (("leaf", "disk"), ("off", "host"), ("block", "host"), ("block", "disk"), ("off", "host")):
        api = graph(info, wide)
        loader, text = find(api, "HeliosModelLoader"), find(api, "HeliosTextEncode")
        api[loader]["inputs"] |= {"group_offload": level, "weights_in": place}
        api[text]["inputs"] |= {"group_offload": level}
        api["save"]["inputs"]["filename_prefix"] = f"offload/{level}_{place}"  # another file, so that it runs
        assert torch.equal(latents(server, api), expected)
    log = server.log.read_text(errors="replace")
    assert "Group offloading of HeliosModel: 4 groups" in log  # leaf: two matrices in each of two blocks
    assert "Group offloading of HeliosModel: 2 groups" in log  # block


def test_offloaded_decoding_gives_a_video(server, info):
    api = small_api("helios_t2v_distilled", info)
    api[find(api, "HeliosChunkedVAEDecode")]["inputs"] |= {"group_offload": "leaf"}
    assert run_workflow(server.url, api).files()
