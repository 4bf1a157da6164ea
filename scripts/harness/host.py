"""Start and stop a real ComfyUI server, and talk to it over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL = 4000  # characters of the server's log in an error

# The server must not outlive us, even when we are killed: Linux ends it with its parent (PR_SET_PDEATHSIG = 1).
# Set in the child's own interpreter, since code between fork and exec is unsafe once torch runs threads.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class HostError(RuntimeError):
    """The server did not start, or answered a request with an error."""


def comfyui_path() -> Path:
    """The ComfyUI tree of the environment: COMFYUI_PATH (relative to the checkout), or what `make setup` unpacks."""
    path = ROOT / os.environ.get("COMFYUI_PATH", "build/comfyui")
    if not (path / "main.py").is_file():
        raise HostError(f"{path} is no ComfyUI checkout. Run `make setup`, or set COMFYUI_PATH to one.")
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Host:
    """A server with this checkout as its only custom node, on 127.0.0.1 and a free port. Use as a context manager.

    base: the folder for everything it writes (output, user, log). models: a ComfyUI models folder that it reads from.
    """

    def __init__(
        self,
        base: Path,
        *,
        models: Path | None = None,
        comfyui: Path | None = None,
        cpu: bool = True,
        port: int | None = None,
        api_nodes: bool = False,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base.resolve()
        self.comfyui = (comfyui or comfyui_path()).resolve()
        self.log = self.base / "server.log"
        self.output = self.base / "output"
        self.port = port  # any that is free, if None
        self.options = ["--preview-method", "latent2rgb", *options]
        if not api_nodes:  # this also gives pages a content policy
            self.options.append("--disable-api-nodes")
        if cpu:  # the CPU's default attention is twice as slow
            self.options += ["--cpu", "--use-pytorch-cross-attention"]
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        pack = self.base / "custom_nodes" / "ComfyUI-Helios"
        pack.unlink(missing_ok=True)
        pack.symlink_to(ROOT, target_is_directory=True)
        if models:
            self.options += ["--extra-model-paths-config", str(self._write_model_paths(models.resolve()))]

    def _write_model_paths(self, models: Path) -> Path:
        folders = {entry.name: entry.name for entry in sorted(models.iterdir()) if entry.is_dir()}
        target = self.base / "extra_model_paths.yaml"
        target.write_text(json.dumps({"models": {"base_path": str(models), **folders}}, indent=1))  # JSON is YAML
        return target

    def get(self, path: str, timeout: float = 30) -> Any:
        return self._request(urllib.request.Request(self.url + path), timeout)

    def post(self, path: str, body: object, timeout: float = 30) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, data, headers), timeout)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def _request(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            raise HostError(f"{request.full_url} answered {error.code}: {error.read().decode()}") from None
        return json.loads(data) if data else None

    def start(self, limit: float = 180) -> Host:
        """Return when the server answers. Another process may take the free port first: then try another."""
        for attempts_left in (2, 1, 0):
            try:
                return self._launch(limit)
            except HostError as error:
                if not attempts_left or "address already in use" not in str(error):
                    raise
        raise AssertionError

    def _launch(self, limit: float) -> Host:
        port = self.port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", DIE_WITH_PARENT, str(os.getpid()), str(self.comfyui / "main.py")]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.env
            )
        end = time.monotonic() + limit
        try:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    raise HostError(f"ComfyUI ended with {self.process.returncode} at its start:\n{self.log_tail()}")
                try:
                    self.get("/system_stats", timeout=5)
                except OSError:  # refused until every node is loaded
                    time.sleep(0.1)
                else:
                    return self
            raise HostError(f"ComfyUI did not answer within {limit:.0f} s:\n{self.log_tail()}")
        except BaseException:
            self.stop()
            raise

    def log_tail(self) -> str:
        return f"{self.log.read_text(errors='replace')[-LOG_TAIL:]}\n(log: {self.log})"

    def stop(self) -> None:
        if not self.process:
            return
        self.process.terminate()  # not SIGINT: a background job's children ignore it
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def __enter__(self) -> Host:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
