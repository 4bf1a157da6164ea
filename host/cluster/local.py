"""Workers on the cards of this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .processes import TO_END, Answers, Ended, end_of_log, start_writing
from .wire import receive

ENTRY = Path(__file__).with_name("entry.py")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}  # else they listen on all networks
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # the latter is ROCm's own, and goes first there


class LocalProcesses:
    """One for each card, as CUDA_VISIBLE_DEVICES names it; None for the CPU."""

    def __init__(self, cards: Sequence[str | None], settings: Mapping[str, Any], folder: Path, answers: Answers):
        self.cards = cards
        self.processes: list[subprocess.Popen[bytes]] = []
        self.inputs: list[Any] = []
        try:
            for rank, card in enumerate(cards):
                self._start(rank, card, settings, folder, answers)
        except BaseException:
            self.end()
            raise

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.poll() is None for process in self.processes)

    def where(self, rank: int) -> str:
        card = self.cards[rank]
        return "" if card is None else f"card {card}"

    def share(self, file: Path) -> None:
        """It is there."""

    def send(self, message: bytes) -> None:
        for waiting in self.inputs:
            waiting.put(message)

    def end(self) -> None:
        processes, self.processes = self.processes, []
        for waiting in self.inputs:
            waiting.put(None)
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()  # which they take for their end
        deadline = time.monotonic() + TO_END
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, rank: int, card: str | None, settings: Mapping[str, Any], folder: Path, answers: Answers) -> None:
        environment = {**os.environ, **LOOPBACK}
        environment.pop("NCCL_COMM_ID", None)  # a rendezvous of somebody else's
        if card is not None:
            environment |= dict.fromkeys(VISIBLE, card)
        log = folder / f"{rank}.log"
        with open(log, "wb") as log_file:
            process = subprocess.Popen(
                [sys.executable, *(["-s"] if sys.flags.no_user_site else []), str(ENTRY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                bufsize=0,  # a buffer cannot be closed while another thread writes to it
                env=environment,
                start_new_session=True,  # an interrupt from the keyboard is for the server
            )
        self.processes.append(process)
        threading.Thread(target=_read, args=(rank, process, log, answers), daemon=True).start()
        self.inputs.append(start_writing(process.stdin))
        job = {**settings["job"], "rank": rank, "folder": str(folder), "store": None}
        self.inputs[rank].put(json.dumps({**settings, "job": job}).encode() + b"\n")


def _read(rank: int, process: subprocess.Popen[bytes], log: Path, answers: Answers) -> None:
    with io.BufferedReader(process.stdout) as stream:  # type: ignore[type-var]
        while (message := receive(stream)) is not None:
            answers.put((rank, message))
    try:
        code = process.wait(TO_END)
    except subprocess.TimeoutExpired:
        code = None
    answers.put((rank, Ended(code, end_of_log(log))))
