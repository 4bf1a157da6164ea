"""Workers on the cards of a Ray cluster, by way of a process that drives it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...helios_core.quoting import quoted
from ..printable import printable_log
from .processes import Answers, Ended, end_of_log, last_error, start_writing
from .wire import receive

log = printable_log(__name__)

DRIVER = Path(__file__).with_name("ray_driver.py")
ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}")
LAST_PORT = 65_535
WITHOUT_TOKEN = "HELIOS_CLUSTER_WITHOUT_TOKEN"  # in the environment: 1 takes a cluster that anybody may use
TO_END = 20.0  # s, of all workers on all machines


def check_address(address: str) -> None:
    """Raise ValueError for what is no address of a Ray cluster, and where Ray is not installed."""
    if not ADDRESS.fullmatch(address) or int(address.rpartition(":")[2]) > LAST_PORT:
        raise ValueError(
            f"address must be the host and port of a Ray cluster, as 10.0.0.5:6379, got {quoted(address)}. Leave it "
            "empty for the cards of this machine."
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "address needs Ray, which is not installed. Install requirements-cluster.txt of ComfyUI-Helios into the "
            "Python that runs ComfyUI, on every machine, or leave address empty for the cards of this machine."
        )


class RayProcesses:
    """One on each of as many cards of the cluster, wherever Ray finds them free; each None: on its processors."""

    def __init__(
        self,
        address: str,
        cards: Sequence[str | None],
        settings: Mapping[str, Any],
        folder: Path,
        answers: Answers,
    ):
        self.names: list[str] = []  # of the workers' machines, once they are known
        self.ended = threading.Event()  # one of the workers, or all
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        if os.environ.get(WITHOUT_TOKEN) != "1":
            environment["RAY_AUTH_MODE"] = "token"
        driver_log = folder / "driver.log"
        with open(driver_log, "wb") as log_file:
            self.driver = subprocess.Popen(
                [sys.executable, str(DRIVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                bufsize=0,  # as in local.py
                env=environment,
                start_new_session=True,
            )
        heard = (self.driver, driver_log, answers, self.names, self.ended)
        threading.Thread(target=_read, args=heard, daemon=True).start()
        self.requests = start_writing(self.driver.stdin)
        order = {
            "address": address,
            "count": len(cards),
            "resource": "CPU" if cards[0] is None else "GPU",
            "switch": WITHOUT_TOKEN,
            "folder": str(folder),
            "settings": settings,
        }
        self.requests.put(json.dumps(order).encode() + b"\n")

    @property
    def alive(self) -> bool:
        return not self.ended.is_set() and self.driver.poll() is None

    def where(self, rank: int) -> str:
        return self.names[rank] if self.names else ""

    def share(self, file: Path) -> None:
        self._request(b"", file=str(file))

    def send(self, message: bytes) -> None:
        self._request(message, file=None)

    def end(self) -> None:
        self.requests.put(None)
        assert self.driver.stdin is not None
        self.driver.stdin.close()  # which it takes for its end, and that of all workers
        try:
            self.driver.wait(TO_END)
        except subprocess.TimeoutExpired:
            self.driver.kill()  # Ray then ends the workers
            self.driver.wait()

    def _request(self, body: bytes, **more: Any) -> None:
        self.requests.put(json.dumps({"size": len(body), **more}).encode() + b"\n" + body)


def _read(
    driver: subprocess.Popen[bytes], driver_log: Path, answers: Answers, names: list[str], ended: threading.Event
) -> None:
    """What the driver tells, into answers and names. Knows no RayProcesses, which may be gone before it ends."""
    with io.BufferedReader(driver.stdout) as stream:  # type: ignore[type-var]
        while line := stream.readline():
            told = json.loads(line)
            body = stream.read(told["size"])
            match told["what"]:
                case "placed":
                    names += told["names"]
                case "message":
                    if (message := receive(io.BytesIO(body))) is not None:
                        answers.put((told["rank"], message))
                case "ended":
                    ended.set()
                    answers.put((told["rank"], Ended(told["code"], told["log"])))
                case "lost":
                    ended.set()
                    answers.put((None, Ended(None, told["said"])))
    ended.set()
    text = end_of_log(driver_log)
    if driver.wait() != 0:
        log.error("Helios Multi-GPU: the log of the process that drives the Ray cluster ends in\n%s", text)
    said = last_error(text.splitlines())
    answers.put((None, Ended(None, f"the process that drives the Ray cluster has ended: {said}.")))
