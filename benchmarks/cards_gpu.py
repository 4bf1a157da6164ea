"""One forward shared out among processes, as Helios Multi-GPU computes it, beside that of one process.

With several cards each process has one, and they talk over NCCL. With one card two processes share it and exchange
through the computer's memory, over gloo: that shows that the numbers are right on a card, what is sent and how much
memory a process takes, and nothing of the time that several cards would take.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from card import Shape, device, median
from measure import Row
from network_gpu import inputs, transformer
from several_cards import messages, sent
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from harness.counted import Counted
from harness.errors import difference, mean_error
from helios_core.config import CHUNK_LATENTS, PATCH
from helios_core.parallel import share_out
from helios_core.transformer import HeliosTransformer, RunBlock

GB = 1e9
DEGREES = (2, 4, 8)
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # else they listen on all networks
PATIENCE = timedelta(seconds=120)  # of a process for the others, after which it fails
SPARE = 1.2  # times the weights: activations, and what a process takes of a card by itself
EXACT_LAYERS, EXACT = 2, 1e-5  # of the network in float32, and what a forward of it may differ by


def rows(shape: Shape) -> Iterator[Row]:
    os.environ |= LOOPBACK
    cards = torch.cuda.device_count()
    over_nccl = [degree for degree in DEGREES if degree <= cards and dist.is_nccl_available()]
    for degree in over_nccl:
        yield from of_processes(shape, "nccl", degree)
    if over_nccl:
        return
    yield Row.open("nccl", f"it takes two cards, and {cards} are here")
    copies = 2 * SPARE * weights_size(shape)
    if torch.cuda.is_available() and copies > torch.cuda.get_device_properties(0).total_memory:
        yield Row.open("gloo", f"two processes on one card take {copies / GB:.0f} GB of it")
        return
    yield from of_processes(shape, "gloo", 2)


def of_processes(shape: Shape, backend: str, degree: int) -> Iterator[Row]:
    """What the first of so many measures; if one fails, all are ended and its error is raised."""
    said = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meet = Path(folder) / "rendezvous"
        processes = spawn(measure, (backend, degree, str(meet), shape, said), degree, join=False, daemon=True)
        assert processes is not None  # it is where nobody waits for them
        ended = False
        while not ended:
            ended = processes.join(timeout=0.2)
            while not said.empty():
                yield said.get()


@torch.inference_mode()
def measure(rank: int, backend: str, degree: int, meet: str, shape: Shape, said: Any) -> None:
    """What each of the processes does; the first tells its rows."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.FileStore(meet, degree)  # type: ignore[attr-defined]  # by a plain path: torch does not decode a URL's
    dist.init_process_group(backend, store=store, rank=rank, world_size=degree, timeout=PATIENCE)
    for row in shared_out(shape, rank, degree, f"{backend}_{degree}"):
        if rank == 0:
            said.put(row)
    dist.destroy_process_group()


def shared_out(shape: Shape, rank: int, degree: int, label: str) -> Iterator[Row]:
    run_block = share_out()
    yield in_float32(shape, run_block, label)
    network = transformer(shape)
    for stage in range(3):
        torch.manual_seed(stage)  # the same inputs in every process
        latents, timestep, text, past = inputs(shape, stage)
        history = network.prepare_history(past)
        alone = partial(network, latents, timestep, network.prepare_text(text), history)
        together = partial(alone, run_block=run_block)
        tokens = history.tokens.shape[1], CHUNK_LATENTS * latents.shape[-2] * latents.shape[-1] // PATCH**2
        name = f"stage{stage}_{label}"
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with patch.object(dist, "all_to_all_single", Counted(rank)) as counted:
            flow = together()
        theory = sent(shape.config, *tokens, degree, rank)
        note = f"by the first, in {counted.messages} messages; peer: theory, in {messages(shape.config)}"
        yield Row.compare(f"sent_{name}", counted.bytes / GB, theory / GB, "GB", note)
        yield peak_memory(name, degree)
        took = median(together, shape.turns)
        if rank == 0:  # the others wait for it
            error = mean_error(flow.float(), alone().float())
            note = f"peer: one process alone; differs by {error:.1e} of its values"
            if label.startswith("gloo"):
                note += "; through the computer's memory, on one device"
            yield Row.compare(f"forward_{name}", took, median(alone, shape.turns), "s", note)


def in_float32(shape: Shape, run_block: RunBlock, label: str) -> Row:
    """By how much a forward of some layers in full width differs from that of one process. Raises for too much."""
    torch.manual_seed(0)
    config = replace(shape.config, num_layers=min(EXACT_LAYERS, shape.config.num_layers))
    network = HeliosTransformer(config, device=device()).eval().requires_grad_(False)
    latents, timestep, text, past = inputs(shape, stage=2)
    ask = partial(network, latents.float(), timestep, text.float(), past.to(torch.float32))
    error = difference(ask(run_block=run_block), ask())
    if not error <= EXACT:
        raise RuntimeError(f"Shared out over {label}, a forward differs by {error:.1e}; at most {EXACT} is right.")
    note = f"of the largest value; {config.num_layers} layers of full width; right up to {EXACT}"
    return Row(f"difference_float32_{label}", error, None, "", note=note)


def weights_size(shape: Shape) -> int:
    network = HeliosTransformer(shape.config, dtype=torch.bfloat16, device="meta")
    return sum(weight.nbytes for weight in network.parameters())


def peak_memory(name: str, degree: int) -> Row:
    """What the forward that was just made took in the process where it took most, weights and prompt included."""
    if not torch.cuda.is_available():
        return Row.open(f"peak_memory_{name}", "no GPU")
    own = torch.tensor([torch.cuda.max_memory_allocated() / GB], device=device())
    peaks = [torch.zeros_like(own) for _ in range(degree)]
    dist.all_gather(peaks, own)
    each = [peak.item() for peak in peaks]
    return Row(f"peak_memory_{name}", max(each), None, "GB", note=", ".join(f"{peak:.2f}" for peak in each))
