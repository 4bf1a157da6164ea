"""The driver of a Ray job, in a process of its own: run by its path, with nothing on its command line.

It starts a worker on each of some cards of a cluster, and passes on what server and workers say to each other; it knows
nothing of either. Not in the server: Ray waits minutes for a cluster that is not there, and ends a process whose
cluster is lost. It imports nothing of the pack: `Relay` goes to the other machines by value, as Ray sends what a script
defines.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil  # type: ignore[import-untyped]  # comes with ComfyUI, and with Ray
import ray
from ray._raylet import GcsClient
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LENGTHS = "<QQ"  # what a message of a worker begins with: its two parts

TO_CONNECT = 60.0  # s, and to get free cards
TO_REACH = 5.0  # s, for the cluster's port to open
TO_END = 5.0  # s, until a worker that does not end is killed
UNHEARD = 30.0  # s, after which a driver counts as gone
LOG_END = 64 * 1024  # bytes
CHUNK = 1 << 20
ASKS = 3  # exit code of a process without a token that was asked for one

WITHOUT_TOKEN = (
    "whoever reaches the Ray cluster at {address} can run programs on it: it asks for no token. Start it with "
    "RAY_AUTH_MODE=token and a token (docs/cluster.md), or, in a network that nobody else is in, set {switch}=1 for "
    "ComfyUI."
)


class Refused(Exception):
    """What the person at the graph is told."""


class Relay:
    """On a machine of the cluster: one worker, what it is sent and what it answers."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = ""
        self.answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.heard = math.inf  # when the driver last asked
        threading.Thread(target=self._watch, daemon=True).start()

    def place(self, paths: list[str]) -> dict[str, Any]:
        """Where this is; the network that reaches it; a port that is free; which of these paths are not there."""
        address = ray.util.get_node_ip_address()
        all_networks = psutil.net_if_addrs()
        networks = [name for name, known in all_networks.items() if address in [each.address for each in known]]
        if ipaddress.ip_address(address).is_loopback:
            networks = ["lo"]
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "name": socket.gethostname(),
            "address": address,
            "network": networks[0] if networks else None,
            "port": port,
            "missing": [path for path in paths if not os.path.exists(path)],
        }

    def start(self, entry: str, settings: dict[str, Any], folder: str, environment: dict[str, str]) -> None:
        job = settings["job"]
        self.folder = os.path.join(tempfile.gettempdir(), folder)
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.log = os.path.join(self.folder, f"{job['rank']}.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, entry],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={**os.environ, **environment},
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.write(json.dumps({**settings, "job": {**job, "folder": self.folder}}).encode() + b"\n")

    @ray.method(concurrency_group="in")
    def write(self, message: bytes) -> None:
        rest = memoryview(message)
        with suppress(OSError, ValueError):  # it has ended: `read` tells
            while rest:
                rest = rest[self.process.stdin.write(rest) :]  # type: ignore[union-attr]

    @ray.method(concurrency_group="in")
    def save(self, name: str, content: bytes) -> None:
        """A file in the folder that the workers of this machine share."""
        part = os.path.join(self.folder, f"{name}.part")
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, os.path.join(self.folder, name))

    @ray.method(concurrency_group="out")
    def read(self) -> bytes | None:
        """The next message, or nothing yet; None where the worker has ended."""
        self.heard = time.monotonic()
        try:
            return self.answers.get(timeout=2.0)
        except queue.Empty:
            return b""

    def ending(self) -> tuple[int | None, str]:
        """The exit code of a worker that has ended, or soon will, and the end of its log."""
        try:
            code = self.process.wait(TO_END)  # type: ignore[union-attr]
        except subprocess.TimeoutExpired:
            code = None
        with open(self.log, "rb") as file:
            return code, file.read()[-LOG_END:].decode("utf-8", errors="replace")

    def end(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            try:
                self.process.wait(TO_END)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        stream = self.process.stdout  # type: ignore[union-attr]
        while (lengths := exactly(stream, struct.calcsize(LENGTHS))) and (
            body := exactly(stream, sum(struct.unpack(LENGTHS, lengths)))
        ) is not None:
            self.answers.put(lengths + body)
        self.answers.put(None)

    def _watch(self) -> None:
        """Ray ends an actor whose driver is gone, but for one that has lost its cluster as well."""
        while time.monotonic() - self.heard < UNHEARD:
            time.sleep(1.0)
        self.end()
        os._exit(1)


def exactly(stream: Any, size: int) -> bytes | None:
    """So many bytes of a stream; None where it ends before."""
    parts = []
    while size:
        part = stream.read(min(size, CHUNK))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Driver:
    """In this process: the relays, and what is told to the server."""

    def __init__(self, answers: BinaryIO):
        self.answers = answers
        self.telling = threading.Lock()
        self.relays: list[Any] = []
        self.nodes: list[str] = []  # of each relay
        self.group: Any = None
        self.address = self.folder = ""

    def tell(self, what: str, body: bytes = b"", **more: Any) -> None:
        """In a line of JSON, and what follows it."""
        with self.telling:
            self.answers.write(json.dumps({"what": what, "size": len(body), **more}).encode() + b"\n" + body)
            self.answers.flush()

    def start(self, order: dict[str, Any]) -> None:
        """Connect, find cards and start a worker on each. Raises Refused."""
        address, count, resource = order["address"], order["count"], order["resource"]
        self.address, self.folder = address, order["folder"]
        connect(address, order["switch"])
        there = int(ray.cluster_resources().get(resource, 0))
        if there < count:
            raise Refused(
                f"cards is {count}, and the Ray cluster at {address} has {there} {resource}s. Set it to as many as "
                "there are, or start Ray on more machines."
            )
        self.group = placement_group([{resource: 1}] * count, strategy="PACK")
        if not self.group.wait(TO_CONNECT):
            free = int(ray.available_resources().get(resource, 0))
            raise Refused(
                f"of the {there} {resource}s of the Ray cluster at {address}, {free} are free, and cards is {count}. "
                "Wait for what uses the others, or set cards to fewer."
            )
        settings = order["settings"]
        entry = str(Path(__file__).with_name("entry.py"))
        needs = {"num_cpus": 0} | {f"num_{resource.lower()}s": 1}
        remote = ray.remote(concurrency_groups={"in": 1, "out": 1}, **needs)(Relay)
        relays = [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, i)).remote()
            for i in range(count)
        ]
        paths = [entry, settings["comfyui"], settings["job"]["path"]]
        places = ray.get([relay.place.remote(paths) for relay in relays], timeout=TO_CONNECT)
        for place in places:
            for path in place["missing"]:
                raise Refused(
                    f"{named(place)} has no {path}. The pack, ComfyUI and the model must lie at the same paths on "
                    "every machine."
                )
        own = ray.get_runtime_context().get_node_id()  # whose cards come first
        ranked = sorted(range(count), key=lambda i: (places[i]["node"] != own, places[i]["node"]))
        self.relays, places = [relays[i] for i in ranked], [places[i] for i in ranked]
        self.nodes = [place["node"] for place in places]
        alone = len(set(self.nodes)) == 1
        started = []
        for rank, (relay, place) in enumerate(zip(self.relays, places, strict=True)):
            network = "lo" if alone else place["network"]
            environment = {"GLOO_SOCKET_IFNAME": network, "NCCL_SOCKET_IFNAME": f"={network}"} if network else {}
            job = {**settings["job"], "rank": rank}
            job["store"] = None if alone else [places[0]["address"], places[0]["port"]]
            folder = f"{Path(self.folder).name}-{place['node'][:12]}"
            started.append(relay.start.remote(entry, {**settings, "job": job}, folder, environment))
        ray.get(started, timeout=TO_CONNECT)
        self.tell("placed", names=[named(place) for place in places])
        for rank in range(count):
            threading.Thread(target=self.listen, args=(rank,), daemon=True).start()
        threading.Thread(target=self.watch, args=(address,), daemon=True).start()

    def listen(self, rank: int) -> None:
        relay = self.relays[rank]
        try:
            while (answer := ray.get(relay.read.remote())) is not None:
                if answer:
                    self.tell("message", answer, rank=rank)
            code, log = ray.get(relay.ending.remote())
        except ray.exceptions.RayError as error:
            code, log = None, f"its machine is lost, or Ray's process for it there ({type(error).__name__})"
        self.tell("ended", rank=rank, code=code, log=log)

    def watch(self, address: str) -> None:
        """Ray itself would wait for a cluster that is gone."""
        missed = 0
        while missed < 3:
            time.sleep(1.0)
            missed = 0 if reachable(address) else missed + 1
        self.tell("lost", said=f"the Ray cluster at {address} is gone. Start it again, and then the run.")

    def follow(self, requests: BinaryIO) -> None:
        """What the server sends, until it is gone or wants no more; then nothing of this is left on any machine."""
        while line := requests.readline():
            head = json.loads(line)
            body = requests.read(head["size"])
            with suppress(ray.exceptions.RayError):  # `listen` tells
                self.forward(head["file"], body)
        if self.relays:
            # All that are left: they can be spoken to where the cluster's heart is gone.
            ray.wait([relay.end.remote() for relay in self.relays], num_returns=len(self.relays), timeout=2 * TO_END)
            if reachable(self.address):  # else Ray would wait for it
                remove_placement_group(self.group)
                ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)  # the server, if it was killed, has left it
        os._exit(0)

    def forward(self, file: str | None, message: bytes) -> None:
        """A message to each worker, or a file to each machine once."""
        if file is None:
            held = ray.put(message)
            for relay in self.relays:
                relay.write.remote(held)
            return
        content = ray.put(Path(file).read_bytes())
        first = [self.relays[self.nodes.index(node)] for node in dict.fromkeys(self.nodes)]
        ray.get([relay.save.remote(Path(file).name, content) for relay in first])


def connect(address: str, switch: str) -> None:
    """To a cluster that asks for a token, unless this variable of the environment is 1. Raises Refused."""
    nobody = (
        f"no Ray cluster answers at {address}. On one machine run ray start --head, on the others ray start "
        "--address, and set address to what the first one says (docs/cluster.md)."
    )
    try:
        if not reachable(address):
            raise Refused(nobody)
        if os.environ.get(switch) != "1" and answers_to_strangers(address):
            raise Refused(WITHOUT_TOKEN.format(address=address, switch=switch))
        if not (has_token() and answers(address)):  # `ray.init` would try again and again, and not say why
            raise Refused(
                f"the Ray cluster at {address} asks for a token, and ComfyUI has none or another. Give it the "
                "cluster's, in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token."
            )
        ray.init(address, log_to_driver=False, configure_logging=False)
    except (OSError, subprocess.TimeoutExpired, ray.exceptions.RpcError):
        raise Refused(nobody) from None
    except (RuntimeError, ValueError) as error:  # another version of Python or of Ray, for one
        raise Refused(f"connecting to the Ray cluster at {address} failed: {error}") from None


def has_token() -> bool:
    """Where one is wanted: without it, Ray's own code ends the process."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return True
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return os.path.isfile(file) and Path(file).read_text(encoding="utf-8").strip() != ""


def answers(address: str) -> bool:
    """Whether a cluster takes this process's token. Raises RpcError where there is none."""
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        return False
    return True


def answers_to_strangers(address: str) -> bool:
    """Whether a cluster asks for no token: a process without one finds out, for a process has one mode for good."""
    stranger = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, __file__, "answers", address]
    code = subprocess.run(command, env=stranger, stdout=2, timeout=TO_CONNECT).returncode
    if code not in (0, ASKS):
        raise ConnectionError(address)
    return code == 0


def reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TO_REACH).close()
    except OSError:
        return False
    return True


def named(place: dict[str, Any]) -> str:
    return f"{place['name']}, {place['address']}"


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Ray prints goes to the log
    order = json.loads(requests.readline())
    driver = Driver(answers)
    threading.Thread(target=driver.follow, args=(requests,), daemon=True).start()
    try:
        driver.start(order)
    except Refused as refusal:
        driver.tell("lost", said=str(refusal))
    except ray.exceptions.RayError as error:
        driver.tell("lost", said=f"the Ray cluster at {order['address']} could not start the workers: {error}")
    threading.Event().wait()  # `follow` ends this process


if __name__ == "__main__":
    if sys.argv[1:2] == ["answers"]:
        sys.exit(0 if answers(sys.argv[2]) else ASKS)
    else:
        main()
