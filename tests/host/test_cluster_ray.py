"""Helios Multi-GPU on a Ray cluster of two "machines", which are addresses of this one."""

from __future__ import annotations

import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import pytest
import torch

from comfyui_helios.host.cluster.ray_cluster import RayProcesses, check_address
from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.cluster.workers import WorkerError
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.nodes.cluster import HeliosMultiGPU
from harness.errors import difference
from support.cluster import ON_CPU, video, with_lora
from support.runs import make_distilled, run_node
from support.videos import TOLERANCE

TOKEN = secrets.token_hex(16)
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
FIRST, SECOND = "127.0.0.2", "127.0.0.3"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Other systems have one loopback address")
pytestmark = [ON_LINUX, pytest.mark.timeout(300)]


class Machine:
    """ray start, and whatever it has started."""

    def __init__(self, folder, address, *arguments, **environment):
        folder.mkdir()
        self.folder, self.log = folder, folder / "log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", address]
        command += ["--num-cpus", "1", "--num-gpus", "0", "--object-store-memory", "100000000"]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**ENVIRONMENT, "TMPDIR": str(folder), **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def end(self):
        """At once: ray stop takes half a minute."""
        while there := processes(f"TMPDIR={self.folder}\0"):
            for pid in there:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


def processes(environment, command=""):
    """Process ids of those with this in their environment and command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            there = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            if environment.encode() in there[0] and command.encode() in there[1]:
                found.append(int(folder.name))
    return sorted(found)


def until(happened):
    deadline = time.monotonic() + 120
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert happened()


def free_address():
    with socket.socket() as taken:
        taken.bind((FIRST, 0))
        return f"{FIRST}:{taken.getsockname()[1]}"


@contextmanager
def first_machine(folder, *arguments, **environment):
    address = free_address()
    with tempfile.TemporaryDirectory(prefix="helios-ray-") as sockets:  # Ray wants a short path
        port = address.partition(":")[2]
        head = ("--head", "--port", port, "--include-dashboard", "false", "--temp-dir", sockets)
        with started(Machine(folder, FIRST, *head, *arguments, **environment)) as machine:
            machine.address = address
            yield machine


@contextmanager
def started(machine):
    try:
        until(lambda: "Ray runtime started" in machine.log.read_text() or machine.process.poll() is not None)
        assert machine.process.poll() is None, machine.log.read_text()
        yield machine
    finally:
        machine.end()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    with (
        first_machine(folder / "first") as first,
        started(Machine(folder / "second", SECOND, "--address", first.address)) as second,
    ):
        yield first, second


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_model(str(make_distilled(tmp_path_factory.mktemp("cluster"))), "fp32")


@pytest.fixture(scope="module")
def remote(plain, machines):
    yield on_several_cards(plain, ON_CPU, address=machines[0].address)
    comfy.model_management.unload_all_models()


def running(command):
    """Process ids of what the cluster and we run with this in their commands."""
    return processes(TOKEN, command)


def workers():
    return running("host/cluster/entry.py")


def left_in_temp(machines):
    return [path for machine in machines for path in machine.folder.glob("helios-workers-*")]


def refused(plain, cards, address):
    with pytest.raises(WorkerError) as error:
        video(on_several_cards(plain, cards, address=address))
    assert workers() == []
    return str(error.value)


def start(model):
    comfy.model_management.load_models_gpu([model])
    assert len(workers()) == 2


def test_two_machines_have_the_latents_of_one_card_and_keep_their_workers_for_other_loras(plain, remote):
    assert difference(video(remote), video(plain)) <= TOLERANCE
    names = remote.model.diffusion_model.workers.group.names
    assert names == [f"{socket.gethostname()}, {address}" for address in (FIRST, SECOND)]
    there = workers()
    assert len(there) == 2
    expected = video(with_lora(plain))
    assert difference(expected, video(plain)) > 1e-3
    assert difference(video(with_lora(remote)), expected) <= TOLERANCE
    assert workers() == there


def test_nothing_outlives_the_model(remote, machines):
    """And the cards are free: the next test has them again."""
    start(remote)
    assert len(left_in_temp(machines)) == 2
    comfy.model_management.unload_all_models()
    assert workers() == [] and running("ray_driver.py") == [] and left_in_temp(machines) == []


def test_a_killed_worker_is_told(remote):
    start(remote)
    os.kill(workers()[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker \d of 2 \(.*, 127.0.0.\d\) has ended: it was killed \(SIGKILL\)"):
        remote.model.diffusion_model.prepare_text(torch.zeros(1, 8, 32))
    assert workers() == []


def test_a_machine_that_is_lost_is_told(remote):
    """Here a process of Ray's, with which everything on a machine goes."""
    start(remote)
    os.kill(running("ray::Relay")[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="has ended: its machine is lost, or Ray's process for it"):
        remote.model.diffusion_model.prepare_text(torch.zeros(1, 8, 32))
    until(lambda: workers() == [])


def test_what_is_missing_is_told(plain, machines):
    address = machines[0].address
    assert f"cards is 3, and the Ray cluster at {address} has 2 CPUs" in refused(plain, (None, None, None), address)
    missing = on_several_cards(plain, ON_CPU, address=address)
    missing.job = replace(missing.job, path="/nowhere/Helios")
    either = f"({FIRST}|{SECOND}) has no /nowhere/Helios. The pack, ComfyUI and the model must lie"  # who says so first
    with pytest.raises(WorkerError, match=either):
        video(missing)
    elsewhere = free_address()
    assert f"no Ray cluster answers at {elsewhere}. On one machine run ray start" in refused(plain, ON_CPU, elsewhere)


@pytest.mark.parametrize("given", ["", secrets.token_hex(16)], ids=["none", "another"])
def test_another_token_is_refused(monkeypatch, tmp_path, plain, machines, given):
    monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray looks next
    assert "asks for a token, and ComfyUI has none or another" in refused(plain, ON_CPU, machines[0].address)


def test_a_cluster_without_a_token_is_refused_unless_that_is_wanted(monkeypatch, tmp_path, plain):
    """Here two cards of one machine, whose workers meet in a file."""
    with first_machine(tmp_path / "open", "--num-cpus", "2", RAY_AUTH_MODE="disabled") as machine:
        assert "it asks for no token. Start it with RAY_AUTH_MODE=token" in refused(plain, ON_CPU, machine.address)
        monkeypatch.setenv("HELIOS_CLUSTER_WITHOUT_TOKEN", "1")
        model = with_lora(on_several_cards(plain, ON_CPU, address=machine.address))
        assert difference(video(model), video(with_lora(plain))) <= TOLERANCE
        [files] = left_in_temp([machine])
        assert len(list(files.glob("*.safetensors"))) == 1 and (files / "rendezvous").exists()
        comfy.model_management.unload_all_models()


def test_a_server_that_is_killed_leaves_nothing(tmp_path):
    """Its end of the pipes goes with it."""
    answers, folder = queue.SimpleQueue(), tmp_path / "helios-workers-x"
    folder.mkdir()
    group = RayProcesses(free_address(), ON_CPU, {}, folder, answers)
    assert "no Ray cluster answers" in answers.get(timeout=120)[1].log
    group.driver.stdin.close()
    group.driver.wait()
    assert not folder.exists()


def test_an_address_is_checked_before_any_work(monkeypatch, plain):
    for address in ("ray://10.0.0.5:10001", "auto", "10.0.0.5", "10.0.0.5:", "10.0.0.5:65536"):
        with pytest.raises(ValueError, match="address must be the host and port of a Ray cluster"):
            run_node(HeliosMultiGPU, plain, 2, 0, address)
    check_address("[fd00::5]:6379")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Ray, which is not installed. Install requirements-cluster.txt"):
        run_node(HeliosMultiGPU, plain, 2, 0, " 10.0.0.5:6379 ")


def test_a_cluster_that_is_gone_is_told(remote, machines):
    """The last test: it ends the heart of the cluster."""
    start(remote)
    for pid in running("gcs_server"):
        os.kill(pid, signal.SIGKILL)
    network = remote.model.diffusion_model
    with pytest.raises(WorkerError, match=f"the Ray cluster at {machines[0].address} is gone|its machine is lost"):
        until(lambda: not network.workers.alive)
        network.prepare_text(torch.zeros(1, 8, 32))
    until(lambda: workers() == [])
