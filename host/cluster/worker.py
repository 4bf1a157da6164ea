"""What a worker does: it loads the model onto its card, and computes its share of every forward."""

from __future__ import annotations

import gc
import os
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import comfy.model_management
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

from ...helios_core.parallel import share_out
from ...helios_core.transformer import HeliosTransformer
from ..model.loading import load_model
from ..model.network import host_attention
from ..model.offload_patcher import Offloading, OffloadPatcher
from .patches import keep_files, read_patches
from .wire import put_together, receive, send

IDLE = 0.2  # s, longer than between two steps
PATIENCE = timedelta(days=1)  # the server's is shorter, and it knows what to say


class Worker:
    """One of several that have the same model and are asked the same at the same time."""

    def __init__(self, job: Mapping[str, Any]):
        self.job, self.rank, self.folder = job, job["rank"], Path(job["folder"])
        degree = job["degree"]
        store: Any
        if job["store"] is None:
            store = FileStore(str(self.folder / "rendezvous"), degree)
        else:
            host, port = job["store"]
            store = TCPStore(host, port, degree, is_master=self.rank == 0)
        store.set_timeout(PATIENCE)
        dist.init_process_group(job["backend"], store=store, timeout=PATIENCE, rank=self.rank, world_size=degree)
        self.run_block = share_out(attend=host_attention({}))
        self.patcher: Any = None
        self.texts: dict[int, Any] = {}  # prepared, by the server's number
        self.histories: dict[int, Any] = {}

    def load(self, asked: Mapping[str, Any]) -> None:
        """From the file, which is in memory already when it is not the first time, where there is room for it.

        The host's own way from some LoRAs to others would gather a copy of all weights in the memory of each worker.
        """
        self.patcher = None
        gc.collect()
        management = comfy.model_management
        management.cleanup_models()
        management.soft_empty_cache()
        offloading = None if self.job["offloading"] is None else Offloading(*self.job["offloading"])
        self.patcher = load_model(self.job["path"], self.job["dtype"], offloading, disable_dynamic=True)
        file = None if asked["file"] is None else self.folder / asked["file"]
        self.patcher.patches = read_patches(file, asked["patches"])
        keep_files(self.folder, asked["keep"])
        management.load_models_gpu([self.patcher], memory_required=asked["memory"])

    def answer(self, asked: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for number in asked["forget"]:
            self.texts.pop(number, None)
            self.histories.pop(number, None)
        if asked["do"] == "load":
            self.load(asked)
            return {}
        network: HeliosTransformer = self.patcher.model.diffusion_model
        given = {name: x.to(self.patcher.load_device) for name, x in tensors.items()}
        if asked["do"] == "prepare_text":
            # Offloaded weights are there only while their block runs.
            offloaded = isinstance(self.patcher, OffloadPatcher)
            self.texts[asked["number"]] = given["text"] if offloaded else network.prepare_text(given["text"])
            return {}
        if asked["do"] == "prepare_history":
            self.histories[asked["number"]] = network.prepare_history(put_together(asked, given))
            return {}
        text = self.texts[asked["text"]] if asked["text"] is not None else given["text"]
        past = self.histories[asked["history"]] if asked["history"] is not None else put_together(asked, given)
        flow = HeliosTransformer.forward(
            network, given["latents"], given["timestep"], text, past, run_block=self.run_block
        )
        return {"flow": flow} if self.rank == 0 else {}


@torch.inference_mode()
def serve(job: Mapping[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the server is gone. The first answer, before anything is asked, says that all are there.

    An error ends this process: the server reads it in the log.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=read, args=(requests, waiting, job["folder"]), daemon=True).start()
    with ExitStack() as stack:
        stack.push(end_at_once)
        worker = Worker(job)
        send(answers, {})
        while True:
            send(answers, {}, worker.answer(*wait_idly(waiting)))


def wait_idly(waiting: queue.SimpleQueue[Any]) -> Any:
    """What is asked next. Nothing for a while: then the memory that PyTorch keeps is for others, as for the VAE."""
    try:
        return waiting.get(timeout=IDLE)
    except queue.Empty:
        comfy.model_management.soft_empty_cache()
        return waiting.get()


def read(requests: BinaryIO, waiting: queue.SimpleQueue[Any], folder: str) -> None:
    """What is asked, as it comes. Whoever asks is gone: so is this process, whatever it is doing, and its folder."""
    with ExitStack() as stack:
        stack.push(end_at_once)
        while (message := receive(requests)) is not None:
            waiting.put(message)
        shutil.rmtree(folder, ignore_errors=True)  # the server, if it was killed, has left it
        os._exit(0)


def end_at_once(kind: Any, error: BaseException | None, trace: Any) -> None:
    """With an error: torch's own way out may wait for the other workers, or abort."""
    if error is not None:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)
