"""What a worker does: it loads the model onto its card, and computes its share of every forward."""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import comfy.model_management
import torch
import torch.distributed as dist
from torch import Tensor

from ...helios_core.parallel import share_out
from ...helios_core.transformer import HeliosTransformer
from ..model.loading import load_model
from ..model.network import host_attention
from ..model.offload_patcher import Offloading, OffloadPatcher
from .patches import read_patches
from .wire import put_together, receive, send

PATIENCE = timedelta(days=1)  # the server's is shorter, and it knows what to say


class Worker:
    """One of several that have the same model and are asked the same at the same time."""

    def __init__(self, job: Mapping[str, Any]):
        self.rank = job["rank"]
        dist.init_process_group(
            job["backend"], job["rendezvous"], timeout=PATIENCE, rank=self.rank, world_size=job["degree"]
        )
        offloading = None if job["offloading"] is None else Offloading(*job["offloading"])
        self.patcher = load_model(job["path"], job["dtype"], offloading, disable_dynamic=True)
        if job["patches"]:
            self.patcher.patches = read_patches(Path(job["patches"]))
        comfy.model_management.load_models_gpu([self.patcher])
        self.network: HeliosTransformer = self.patcher.model.diffusion_model
        self.run_block = share_out(attend=host_attention({}))
        self.device = self.patcher.load_device
        self.texts: dict[int, Any] = {}  # prepared, by the server's number
        self.histories: dict[int, Any] = {}

    def answer(self, asked: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for number in asked["forget"]:
            self.texts.pop(number, None)
            self.histories.pop(number, None)
        given = {name: x.to(self.device) for name, x in tensors.items()}
        if asked["do"] == "prepare_text":
            # Offloaded weights are there only while their block runs.
            offloaded = isinstance(self.patcher, OffloadPatcher)
            self.texts[asked["number"]] = given["text"] if offloaded else self.network.prepare_text(given["text"])
            return {}
        if asked["do"] == "prepare_history":
            self.histories[asked["number"]] = self.network.prepare_history(put_together(asked, given))
            return {}
        text = self.texts[asked["text"]] if asked["text"] is not None else given["text"]
        past = self.histories[asked["history"]] if asked["history"] is not None else put_together(asked, given)
        flow = HeliosTransformer.forward(
            self.network, given["latents"], given["timestep"], text, past, run_block=self.run_block
        )
        return {"flow": flow} if self.rank == 0 else {}


@torch.inference_mode()
def serve(job: Mapping[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the server is gone. The first answer says that the model is loaded.

    An error ends this process: the server reads it in the log.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=read, args=(requests, waiting, job["folder"]), daemon=True).start()
    worker = Worker(job)
    send(answers, {})
    while True:
        send(answers, {}, worker.answer(*waiting.get()))


def read(requests: BinaryIO, waiting: queue.SimpleQueue[Any], folder: str) -> None:
    """What is asked, as it comes. Whoever asks is gone: so is this process, whatever it is doing, and its folder."""
    while (message := receive(requests)) is not None:
        waiting.put(message)
    shutil.rmtree(folder, ignore_errors=True)  # the server, if it was killed, has left it
    os._exit(0)
