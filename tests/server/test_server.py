"""Our workflows on a real server: videos, progress, previews, interruption, seeds, caching and errors."""

import io
import re
import shutil
import urllib.request
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness.client import ExecutionFailed, ExecutionInterrupted, PromptRejected, run_workflow
from harness.host import Host
from harness.small import FRAMES, ON_TINY, WORKFLOWS, find, read_workflow, small_api, with_latents

DISTILLED = "helios_t2v_distilled"
READER = "HeliosPromptFromFile"


@pytest.fixture(scope="module")
def restarted(models, tmp_path_factory):
    """A second server, which knows nothing of the first."""
    with Host(tmp_path_factory.mktemp("restarted"), models=models) as host:
        yield host


def video(server, run):
    [file] = run.files()
    with av.open(str(server.output / file["subfolder"] / file["filename"])) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.average_rate)


def latents(server, run):
    [file] = run.files()
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"]


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS if path.stem not in ON_TINY])
def test_a_workflow_gives_whole_chunks(server, info, name):
    frames, fps = video(server, run_workflow(server.url, small_api(name, info)))
    size = (128, 256, 3) if name == "helios_upscale" else (64, 128, 3)
    assert (len(frames), frames[0].shape, fps) == (FRAMES.get(name, 66), size, 24)
    assert frames[0].std() > 5  # a picture,
    assert abs(frames[40].astype(int) - frames[50]).mean() > 5  # and it moves


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_a_workflow_takes_the_rate_of_its_video_from_the_decoder(info, name):
    """Create Video's own says 30, and the models make 24."""
    api = small_api(name, info)
    rates = [node["inputs"]["fps"] for node in api.values() if node["class_type"] == "CreateVideo"]
    assert len(rates) == (name not in ("helios_live", "helios_stream"))  # which write their own
    assert all((api[node]["class_type"], slot) == ("HeliosChunkedVAEDecode", 1) for node, slot in rates)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_a_workflow_has_no_node_that_the_host_calls_deprecated(info, name):
    """0.33 writes it into the node's title, as of Batch Images, and may have it no longer one day."""
    assert [n["type"] for n in read_workflow(name)["nodes"] if info.get(n["type"], {}).get("deprecated")] == []


@pytest.mark.parametrize("variant", ["base", "mid", "distilled"])
def test_the_loaders_own_schedule_is_that_of_the_workflow(server, info, variant):
    """What the folder's files say, against the schedule node with its defaults."""
    api = with_latents(small_api(f"helios_t2v_{variant}", info, frames=33), "node")
    expected = latents(server, run_workflow(server.url, api))
    api[find(api, "HeliosChunkedSampler")]["inputs"]["schedule"] = [find(api, "HeliosDiffusersLoader"), 3]
    assert torch.equal(latents(server, run_workflow(server.url, api)), expected)


def test_trim_gives_the_frames_asked_for(server, info):
    frames, _ = video(server, run_workflow(server.url, small_api(DISTILLED, info, trim=True)))
    assert len(frames) == 40


def test_progress_runs_once_over_all_steps_with_previews(server, info):
    api = small_api(DISTILLED, info, seed=100)
    run = run_workflow(server.url, api)
    sampler = find(api, "HeliosChunkedSampler")
    ticks = [tick for tick in run.progress if tick.node == sampler]
    assert {tick.maximum for tick in ticks} == {12 + 6}  # the first chunk is amplified
    values = [tick.value for tick in ticks]
    assert values == sorted(set(values))
    assert values[-1] == 18
    # The server sends the newest preview only when it cannot keep up.
    during = [preview.image for preview in run.previews if preview.seconds <= ticks[-1].seconds]
    assert len({Image.open(io.BytesIO(image)).convert("RGB").tobytes() for image in during}) >= 2


def test_interrupting_stops_within_a_step_and_the_next_run_is_right(server, info):
    expected = latents(server, run_workflow(server.url, with_latents(small_api(DISTILLED, info, seed=7), "whole")))
    # At full size a step takes long against the message that asks to stop.
    long = with_latents(small_api("helios_t2v_base", info, width=640, height=384, frames=330, seed=7), "cut")
    sampler, pressed = find(long, "HeliosChunkedSampler"), []

    def press(event):
        if event.kind == "progress" and event.data["node"] == sampler and not pressed:
            pressed.append(event.data["value"])
            server.interrupt()

    with pytest.raises(ExecutionInterrupted) as caught:
        run_workflow(server.url, long, on_event=press)
    assert max(tick.value for tick in caught.value.run.progress if tick.node == sampler) - pressed[0] <= 1
    again = with_latents(small_api(DISTILLED, info, seed=7), "again")
    assert torch.equal(latents(server, run_workflow(server.url, again)), expected)


def test_same_seed_same_latents_twice_and_across_restarts(server, info, restarted):
    def run(host, seed, prefix):
        return latents(host, run_workflow(host.url, with_latents(small_api(DISTILLED, info, seed=seed), prefix)))

    first, other, second = (run(server, seed, f"seed{i}") for i, seed in enumerate((11, 12, 11)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(run(restarted, 11, "restarted"), first)


def test_unchanged_loaders_and_prompts_do_not_run_again(server, info):
    api = with_latents(small_api(DISTILLED, info, seed=21), "cache")
    run_workflow(server.url, api)
    api[find(api, "HeliosChunkedSampler")]["inputs"]["seed"] = 22
    assert run_workflow(server.url, api).executed() == [find(api, "HeliosChunkedSampler"), "save"]


def good_run(server, info, seed):
    frames, _ = video(server, run_workflow(server.url, small_api(DISTILLED, info, frames=33, seed=seed)))
    assert len(frames) == 33


def broken(models, kind):
    """A single file that is not a whole Helios transformer."""
    source = models / "diffusion_models" / "helios_distilled_bf16.safetensors"
    target = source.with_name(f"{kind}.safetensors")
    whole = load_file(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    if kind == "truncated":
        target.write_bytes(source.read_bytes()[:-100])
    elif kind == "no_safetensors":
        target.write_bytes(b"PK\x03\x04 this is a zip file" * 10)
    elif kind == "missing":
        save_file({k: v for k, v in whole.items() if ".attn2." not in k}, target, metadata)
    elif kind == "unexpected":
        save_file({**whole, "blocks.0.extra.weight": torch.zeros(3)}, target, metadata)
    elif kind == "wan":
        save_file({"blocks.0.self_attn.q.weight": torch.zeros(8, 8), "patch_embedding.weight": torch.zeros(8)}, target)
    return target.name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated|cut|bytes"),
        ("no_safetensors", "safetensors"),
        ("missing", r"missing.*attn2"),
        ("unexpected", r"unexpected.*blocks\.0\.extra\.weight|blocks\.0\.extra\.weight"),
        ("wan", "Wan 2.1"),
    ],
)
def test_a_bad_file_is_explained_and_the_server_goes_on(server, models, info, kind, message):
    name = broken(models, kind)
    api = small_api("helios_t2v_distilled_files", server.get("/object_info"), model_name=name)
    with pytest.raises(ExecutionFailed, match=rf"(?is)HeliosModelLoader.*{name}.*({message})"):
        run_workflow(server.url, api)
    good_run(server, info, seed=30)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 144}, r"144x64.*nearest that works is 128x64"),
        ({"height": 80, "width": 64}, r"64x80.*nearest that works is 64x64"),
    ],
)
def test_a_size_the_variant_cannot_make_is_explained_before_anything_loads(server, info, inputs, message):
    api = with_latents(small_api(DISTILLED, info, **inputs), "never")
    with pytest.raises(ExecutionFailed, match=message) as caught:
        run_workflow(server.url, api)
    assert not [tick for tick in caught.value.run.progress if tick.node == find(api, "HeliosChunkedSampler")]
    good_run(server, info, seed=31)


@pytest.mark.parametrize(
    "inputs", [{"folder": "../../etc"}, {"dtype": "int4"}, {"shift_level": "none"}, {"unit": "days"}]
)
def test_values_that_are_not_on_the_list_are_named(server, info, inputs):
    """Newer hosts reject them; 0.3.75 does not look at the lists of V3 nodes."""
    with pytest.raises((PromptRejected, ExecutionFailed), match=re.escape(*inputs.values())):
        run_workflow(server.url, small_api("helios_interactive", info, **inputs))


@pytest.mark.parametrize("inputs", [{"frames": 0}, {"steps_stage_2": 0}])
def test_impossible_values_are_rejected_at_once(server, info, inputs):
    with pytest.raises(PromptRejected):
        run_workflow(server.url, small_api(DISTILLED, info, **inputs))
    good_run(server, info, seed=32)


def test_a_contradicting_schedule_warns_on_the_node(server, info):
    """The distilled model under Base's schedule: it runs, and says that it will look wrong."""
    api = with_latents(small_api("helios_t2v_base", info, steps=2, frames=33, seed=5), "contradiction")
    api[find(api, "HeliosDiffusersLoader")]["inputs"]["folder"] = "Helios-Distilled"
    run_workflow(server.url, api)
    assert "Wrong schedule: connect Helios-Distilled's" in server.log.read_text()


def test_going_on_equals_one_run_across_restarts(server, info, restarted):
    """Two samplers in a row, against one; and by the host's own Save and Load Latent, which drop our key."""
    api = with_latents(small_api("helios_extend", info, frames=33), "extend")
    first, second = "15", "35"  # the samplers of helios_extend
    texts = [node for node in api.values() if node["class_type"] == "HeliosTextEncode"]
    texts[1]["inputs"]["positive"] = texts[0]["inputs"]["positive"]
    api["save"]["inputs"]["samples"] = [second, 0]
    going_on = latents(server, run_workflow(server.url, api))
    whole = with_latents(small_api(DISTILLED, info, frames=66), "whole66")
    whole[find(whole, "HeliosChunkedSampler")]["inputs"]["seed"] = api[first]["inputs"]["seed"]
    one_run = latents(server, run_workflow(server.url, whole))
    assert torch.equal(going_on, one_run[:, :, 9:])

    api["save"]["inputs"]["samples"] = [first, 0]
    [file] = run_workflow(server.url, api).files()
    shutil.copy(server.output / file["subfolder"] / file["filename"], restarted.base / "input" / "first.latent")
    api["load"] = {"class_type": "LoadLatent", "inputs": {"latent": "first.latent"}}
    api["33"]["inputs"]["previous"] = ["load", 0]
    api["save"]["inputs"]["samples"] = [second, 0]
    resumed = latents(restarted, run_workflow(restarted.url, api))
    assert "has lost what Helios adds" in restarted.log.read_text()
    assert resumed.shape == going_on.shape
    assert torch.isfinite(resumed).all()


def test_each_queued_run_takes_the_next_prompt_of_the_file(server, info):
    api = with_latents(small_api("helios_prompt_file", info, frames=33), "prompts")
    reader = find(api, READER)
    [widgets] = [n["widgets_values"] for n in read_workflow("helios_prompt_file")["nodes"] if n["type"] == READER]
    assert widgets[2] == "increment"  # what makes the page count up
    results = []
    for index in range(3):
        api[reader]["inputs"]["index"] = index
        results.append(latents(server, run_workflow(server.url, api)))
    assert not torch.allclose(results[0], results[1])
    assert torch.equal(results[0], results[2])  # two prompts: the third run begins again


def test_a_minute_of_video(server, info):
    """1452 frames, 44 chunks, sampled in the server; what it holds does not grow with every chunk."""
    api = with_latents(
        small_api(DISTILLED, info, frames=1452, steps_stage_1=1, steps_stage_2=1, steps_stage_3=1), "long"
    )
    status = Path(f"/proc/{server.process.pid}/status")
    resident = []

    def watch(event):
        if event.kind == "progress" and event.data["node"] == find(api, "HeliosChunkedSampler"):
            resident.append(int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) / 1024)

    result = latents(server, run_workflow(server.url, api, on_event=watch))
    assert result.shape == (1, 16, 9 * 44, 8, 16)
    assert torch.isfinite(result).all()
    assert max(resident[len(resident) // 2 :]) - max(resident[: len(resident) // 2]) < 20  # MB


def test_every_node_has_a_help_page(server, info):
    ours = [name for name, node in info.items() if node["python_module"] == "custom_nodes.ComfyUI-Helios"]
    assert len(ours) == 16
    for name in ours:
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-Helios/docs/{name}.md") as page:
            assert page.read().decode().startswith(f"# {info[name]['display_name']}")
