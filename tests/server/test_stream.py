"""Helios Stream Video in real servers: its files, and what is left after cancelling, faults and kill -9."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from harness.client import ExecutionFailed, ExecutionInterrupted, RunError, run_workflow
from harness.host import Host
from harness.small import find, small_api

NAME, NODE = "helios_stream", "HeliosStreamVideo"
LONG = 5  # chunks of the runs that are killed
KILLS = int(os.environ.get("HELIOS_KILLS", "1"))  # `make soak` takes 20
FAULTS = '''
"""Nodes that fail on demand."""

import torch
from comfy.patcher_extension import WrappersMP


class FaultyModel:
    """A MODEL whose network is out of memory at its call `at`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "at": ("INT", {"default": 1})}}

    def make(self, model, at):
        calls = []

        def wrapper(executor, *args, **kwargs):
            calls.append(None)
            if len(calls) == at:
                raise torch.OutOfMemoryError("injected: CUDA out of memory")
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
        return (model,)


class FaultyVAE:
    """A VAE that cannot allocate at its decoding number `at`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "at": ("INT", {"default": 1})}}

    def make(self, vae, at):
        class Faulty:
            patcher, vae_dtype, memory_used_decode = vae.patcher, vae.vae_dtype, staticmethod(vae.memory_used_decode)
            calls = []  # of all copies

            def decode(self, samples):
                self.calls.append(samples)
                if len(self.calls) == at:
                    raise RuntimeError("injected: DefaultCPUAllocator: not enough memory")
                return vae.decode(samples)

        return (Faulty(),)


NODE_CLASS_MAPPINGS = {"FaultyModel": FaultyModel, "FaultyVAE": FaultyVAE}
'''


@pytest.fixture(scope="module")
def host(models, tmp_path_factory):
    """A server of our own, with nodes that fail."""
    base = tmp_path_factory.mktemp("stream")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "faults.py").write_text(FAULTS)
    with Host(base, models=models) as host:
        yield host


@pytest.fixture(scope="module")
def info(host):
    return dict(host.get("/object_info"))


def stream_api(info, prefix, **inputs):
    """The streaming workflow, whose tail is saved too."""
    api = small_api(NAME, info, **{"frames": 66, "resume": False, **inputs})
    api["tail"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [find(api, NODE), 1], "filename_prefix": f"{prefix}_tail"},
    }
    api[find(api, "SaveVideo")]["inputs"]["filename_prefix"] = prefix
    return api


def saved(host, run):
    """(video files, tail latents) of a run."""
    files = [host.output / file["subfolder"] / file["filename"] for file in run.files()]
    [tail] = [load_file(file)["latent_tensor"] for file in files if file.suffix == ".latent"]
    return [file for file in files if file.suffix == ".mp4"], tail


def in_temp(host):
    """What the node has in the host's temp folder."""
    return sorted((host.base / "temp").glob("helios_*"))


def frames(file):
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def packets(file):
    with av.open(str(file)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def good_run(host, info, seed):
    run = run_workflow(host.url, stream_api(info, "good", frames=33, seed=seed))
    [file], _ = saved(host, run)
    assert len(frames(file)) == 33


def test_a_batch_is_saved_as_it_was_encoded_and_its_tail_is_the_samplers(host, info):
    before = set(in_temp(host))
    run = run_workflow(host.url, stream_api(info, "batch", frames=70, batch_size=2, trim=True, seed=1))
    files, tail = saved(host, run)
    made = [file for file in in_temp(host) if file not in before]
    assert len(files) == len(made) == 2
    assert sorted(map(packets, files)) == sorted(map(packets, made))
    for file in files:
        shown = frames(file)
        assert len(shown) == 70
        assert shown[0].std() > 5
        assert abs(shown[40].astype(int) - shown[60]).mean() > 5
    sampler = small_api("helios_t2v_distilled", info, frames=70, batch_size=2, seed=1)
    kept = ("HeliosChunkedSampler", "HeliosDiffusersLoader", "HeliosTextEncode", "HeliosHistory", "HeliosDistilled")
    sampler = {key: node for key, node in sampler.items() if node["class_type"].startswith(kept)}
    whole = [find(sampler, "HeliosChunkedSampler"), 0]
    sampler["save"] = {"class_type": "SaveLatent", "inputs": {"samples": whole, "filename_prefix": "whole"}}
    [file] = run_workflow(host.url, sampler).files()
    latents = load_file(host.output / file["subfolder"] / file["filename"])["latent_tensor"]
    assert torch.equal(tail, latents[:, :, -9:])


def test_cancelling_stops_both_and_the_next_run_is_right(host, info):
    before = in_temp(host)
    # At full size a chunk of six steps takes long against the message that asks to stop.
    api = stream_api(info, "cut", width=640, height=384, frames=330, seed=7, amplify_first_chunk=False)
    node, pressed = find(api, NODE), []

    def press(event):
        if event.kind == "progress" and event.data["node"] == node and event.data["value"] > 8:
            pressed.append(event.data["value"])
            if len(pressed) == 1:
                host.interrupt()

    with pytest.raises(ExecutionInterrupted) as caught:
        run_workflow(host.url, api, on_event=press)
    assert max(tick.value for tick in caught.value.run.progress if tick.node == node) - pressed[0] <= 6
    assert in_temp(host) == before
    assert not list(host.output.glob("cut*"))
    good_run(host, info, 8)


@pytest.mark.parametrize(
    ("kind", "at", "overlap"),
    [("FaultyModel", 1, "off"), ("FaultyModel", 15, "auto"), ("FaultyVAE", 1, "auto"), ("FaultyVAE", 2, "off")],
)
def test_no_memory_leaves_no_file_and_the_next_graph_runs(host, info, kind, at, overlap):
    before = in_temp(host)
    api = stream_api(info, "fault", seed=20 + at, overlap_decode=overlap)
    node, name = api[find(api, NODE)], "model" if kind == "FaultyModel" else "vae"
    api["fault"] = {"class_type": kind, "inputs": {name: node["inputs"][name], "at": at}}
    node["inputs"][name] = ["fault", 0]
    with pytest.raises(ExecutionFailed, match="Helios Stream Video ran out of memory"):
        run_workflow(host.url, api)
    assert in_temp(host) == before
    assert not list(host.output.glob("fault*"))
    good_run(host, info, 30 + at)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux can limit another process's files")
@pytest.mark.parametrize(("resume", "what"), [(True, "chunk 1 of the video"), (False, "the video")])
def test_no_room_is_explained_and_the_next_graph_runs(host, info, resume, what):
    """A limit on the size of the server's files: to a writer the same as a full disk."""
    before = in_temp(host)
    api = stream_api(info, "full", width=320, height=192, crf=0, seed=41, resume=resume)
    pid, kind = host.process.pid, resource.RLIMIT_FSIZE
    limits = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (200_000, limits[1]))
    try:
        with pytest.raises(ExecutionFailed, match=rf"no room for {what} in .*Free some space"):
            run_workflow(host.url, api)
    finally:
        resource.prlimit(pid, kind, limits)
    assert in_temp(host) == before
    assert not list(host.output.glob("full*"))
    assert not list(host.output.glob("helios_resume/*/*"))
    good_run(host, info, 42 + resume)


def chunk_files(host):
    return sorted(host.output.glob("helios_resume/*/chunk_*.safetensors"))


def contents(host):
    return [load_file(file) for file in chunk_files(host)]


@pytest.mark.timeout(240 + 60 * KILLS)
def test_killed_at_any_moment_and_resumed_it_gives_the_same_latents(host, info):
    """Each time another crf, which makes the host run the node again and changes no latents."""

    def api(crf):
        return stream_api(info, "killed", frames=33 * LONG, seed=5, resume=True, crf=crf)

    empty(host.output)
    [file], expected_tail = saved(host, run_workflow(host.url, api(8)))
    expected = contents(host)
    assert len(expected) == LONG
    assert len(frames(file)) == 33 * LONG
    empty(host.output)
    start = time.monotonic()
    run_workflow(host.url, api(9))  # how long it takes once models and prompts are loaded, as they are from here on
    whole_run = time.monotonic() - start
    seed = random.randrange(10**6)
    moments, resumed = random.Random(seed), []
    for number in range(KILLS):
        empty(host.output)
        moment = moments.uniform(0, whole_run)
        print(f"kill {number + 1} of {KILLS} (seed {seed}): after {moment:.2f} of {whole_run:.2f} s")
        kill_during(host, api(11 + number), moment)
        resumed.append(len(chunk_files(host)))
        host.start()  # before anything is asserted: other tests need it as well
        for video in host.output.glob("*.mp4"):  # none, or a whole one
            assert len(frames(video)) == 33 * LONG
        [file], tail = saved(host, run_workflow(host.url, api(11 + number)))
        assert torch.equal(tail, expected_tail)
        assert len(frames(file)) == 33 * LONG
        same = [
            a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in zip(expected, contents(host), strict=True)
        ]
        assert all(same)
        said = re.findall(rf"Resumed after chunk (\d+) of {LONG}", host.log.read_text())
        assert said == ([str(resumed[-1])] if 0 < resumed[-1] < LONG else [])
    print(f"chunks that were there after each kill: {resumed}")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def kill_during(host, api, moment):
    """Run the graph, and kill -9 the server that long after."""

    def run():
        with contextlib.suppress(RunError, OSError):
            run_workflow(host.url, api)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(moment)
    host.process.send_signal(signal.SIGKILL)
    host.process.wait()
    thread.join(60)


def test_cancelled_and_resumed_in_one_server(host, info):
    empty(host.output)
    api = stream_api(info, "resumed", frames=33 * 6, seed=51, resume=True)
    node = find(api, NODE)
    with pytest.raises(ExecutionInterrupted):
        run_workflow(host.url, api, on_event=press_after(host, node, 12 + 6 * 3))
    there = len(chunk_files(host))
    assert 1 <= there < 6
    run = run_workflow(host.url, api)
    _, tail = saved(host, run)
    ticks = [tick for tick in run.progress if tick.node == node]
    done = 12 + 6 * (there - 1)  # the first chunk is amplified
    assert {tick.maximum for tick in ticks} == {12 + 6 * 5}  # one bar: encoding what is there, then sampling the rest
    assert [tick.value for tick in ticks][-1] == 12 + 6 * 5
    assert done in {tick.value for tick in ticks}
    assert [tick.value for tick in ticks] == sorted(tick.value for tick in ticks)
    assert f"Resumed after chunk {there} of 6." in host.log.read_text()
    fresh = stream_api(info, "fresh", frames=33 * 6, seed=51, crf=20)
    _, expected = saved(host, run_workflow(host.url, fresh))
    assert torch.equal(tail, expected)

    last = chunk_files(host)[-1]
    last.write_bytes(last.read_bytes()[:-50])
    api[node]["inputs"]["crf"] = 30
    _, tail = saved(host, run_workflow(host.url, api))
    assert torch.equal(tail, expected)
    assert re.search(rf"{re.escape(Path(last).name)} is damaged.*It is not used, and made again", host.log.read_text())


def press_after(host, node, step):
    def press(event):
        if event.kind == "progress" and event.data["node"] == node and event.data["value"] == step:
            host.interrupt()

    return press
