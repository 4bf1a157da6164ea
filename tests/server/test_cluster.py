"""Helios Multi-GPU in our workflows on a real server, with workers on the CPU in place of cards."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from harness.client import ExecutionFailed, ExecutionInterrupted, run_workflow
from harness.errors import difference
from harness.host import Host
from harness.small import find, small_api, with_latents

TOLERANCE = 2e-5  # of the largest value, as for whole runs
CHUNKS = 4
STEPS = 12 + 6 * (CHUNKS - 1)  # the first chunk is amplified
KILLS = int(os.environ.get("HELIOS_KILLS", "1"))  # `make soak` takes 20
TEMP = "system_temp"
STREAM = "HeliosStreamVideo"


@pytest.fixture(scope="module")
def host(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("cluster")
    (base / TEMP).mkdir()
    with Host(base, models=models, env={"HELIOS_MULTI_GPU_ON_CPU": "1", "TMPDIR": str(base / TEMP)}) as host:
        yield host


@pytest.fixture(scope="module")
def info(host):
    return dict(host.get("/object_info"))


@pytest.fixture(autouse=True)
def no_workers_of_other_graphs(host):
    """The server lets go of another graph's model up to ten seconds after its run."""
    deadline = time.monotonic() + 60
    while workers(host) and time.monotonic() < deadline:
        host.post("/free", {"unload_models": True, "free_memory": True})  # it hears of it only where it waits
        time.sleep(0.5)
    assert workers(host) == []


def on_two(api):
    """The same graph, with its model on two workers."""
    loader = find(api, "HeliosDiffusersLoader")
    for node in api.values():
        if node["inputs"].get("model") == [loader, 0]:
            node["inputs"]["model"] = ["cards", 0]
    api["cards"] = {"class_type": "HeliosMultiGPU", "inputs": {"model": [loader, 0], "cards": 2}}
    return api


def saved(host, api):
    """The latents that a graph saves."""
    files = [host.output / file["subfolder"] / file["filename"] for file in run_workflow(host.url, api).files()]
    [latents] = [load_file(file)["latent_tensor"] for file in files if file.suffix == ".latent"]
    return latents


def workers(host):
    """Process ids of the server's workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2]
        except OSError:  # it has ended meanwhile
            continue
        if b"host/cluster/entry.py" in command and int(parent.split()[1]) == host.process.pid:
            found.append(int(folder.name))
    return sorted(found)


def stream_api(info, **inputs):
    api = small_api("helios_stream", info, **{"frames": 33 * CHUNKS, "resume": True, "seed": 5, **inputs})
    latent = {"samples": [find(api, STREAM), 1], "filename_prefix": "tail"}
    api["tail"] = {"class_type": "SaveLatent", "inputs": latent}
    return api


def after_chunks(host, count, act):
    """An on_event that acts once, when so many chunks of a stream are saved."""
    done = []

    def on_event(event):
        if not done and len(list(host.output.glob("helios_resume/*/chunk_*.safetensors"))) >= count:
            done.append(True)
            act()

    return on_event


def killing(host, step, victim):
    """An on_event that kills a worker once, when a stream has made this step."""
    done = []

    def on_event(event):
        if event.kind == "progress" and event.data["max"] == STEPS and event.data["value"] >= step and not done:
            done.append(True)
            os.kill(workers(host)[victim], signal.SIGKILL)

    return on_event


def left_in_temp(host):
    """What workers have left in the system's folder for temporary files."""
    return list((host.base / TEMP).glob("helios-workers-*"))


@pytest.mark.parametrize("name", ["helios_t2v_mid", "helios_interactive"])
def test_a_workflow_has_the_latents_of_one_card(host, info, name):
    expected = saved(host, with_latents(small_api(name, info), "one"))
    assert difference(saved(host, on_two(with_latents(small_api(name, info), "two"))), expected) <= TOLERANCE
    assert len(workers(host)) == 2


def test_interrupted_it_keeps_its_workers_and_goes_on(host, info):
    api = on_two(stream_api(info))
    with pytest.raises(ExecutionInterrupted):
        run_workflow(host.url, api, on_event=after_chunks(host, 1, host.interrupt))
    there = workers(host)
    assert len(there) == 2
    expected = saved(host, stream_api(info, resume=False))
    assert difference(saved(host, api), expected) <= TOLERANCE
    assert "Resumed after chunk" in host.log.read_text()


@pytest.mark.timeout(240 + 120 * KILLS)
def test_workers_killed_at_any_moment_are_told_and_the_video_is_resumed(host, info):
    """Each time another crf, which makes the host run the node again and changes no latents."""
    expected = saved(host, stream_api(info, seed=6, resume=False))
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    killed = 0
    tries = 3 + 3 * KILLS  # what the server says may come late: a run may be over before its worker is killed
    for number in range(tries):
        shutil.rmtree(host.output)
        host.output.mkdir()
        api = on_two(stream_api(info, seed=6, crf=number % 52))
        step, victim = moments.randint(1, STEPS // 2), moments.randrange(2)
        print(f"run {number + 1} (seed {seed}): worker {victim + 1} at step {step}")
        try:
            run_workflow(host.url, api, on_event=killing(host, step, victim))
        except ExecutionFailed as error:
            assert re.search(r"worker \d of 2 has ended", str(error))
            assert workers(host) == [] and left_in_temp(host) == []
            assert difference(saved(host, api), expected) <= TOLERANCE
            assert len(workers(host)) == 2
            killed += 1
        if killed == KILLS:
            return
    pytest.fail(f"Of {tries} runs, {killed} were going on when their worker was killed.")


def test_nothing_of_the_workers_outlives_the_server(host, info):
    """The last test: it kills the server."""
    saved(host, on_two(with_latents(small_api("helios_t2v_distilled", info, seed=7), "two")))
    there = workers(host)
    assert len(there) == 2
    host.process.kill()
    host.process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in there):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in there)
    assert left_in_temp(host) == []
