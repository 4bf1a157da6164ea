"""ComfyUI's dynamic VRAM (0.16 and later) without a card: a stand-in for comfy-aimdo, in the computer's memory.

The host's own code runs on it: ModelPatcherDynamic, the casts of its layers, pins, LoRAs in use. Like the real one it
counts how often a page of weights was asked for and given back; where room is short it takes pages that nobody holds,
from the top of a model down, and refuses pages above what is left. What it has taken is NaN from then on. With `churn`
it also takes pages at random whenever weights are asked for: who holds on to weights too long is found sooner.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import numpy as np
import torch
from torch import Tensor

from support.computing_card import CardTensor, computing_card
from support.pretended_card import CARD

PAGE = 4096  # bytes; 32 MiB in truth, for weights that are a thousand times larger
GONE = 0xFF  # of every byte: NaN in all formats of weights
CHURN = 0.2  # of the pages, at a time
BUFFER = 1 << 24  # of weights that are there for one layer's computation alone
STREAMED_ABOVE = 16 * 1024  # bytes of a module: smaller ones the host loads whole
ROOM = 64 * 1024**3


class Vram:
    """The card's memory, as far as the host keeps track of it."""

    def __init__(self, pages: float = math.inf, churn: int | None = None) -> None:
        """pages: of weights that may be there at once; churn: a seed."""
        self.pages, self.size = pages, ROOM
        self.churn = None if churn is None else random.Random(churn)
        self.models: list[ModelVBAR] = []  # the first is the first to give way
        self.evicted = 0

    @property
    def there(self) -> int:
        return sum(len(model.there) for model in self.models)

    @property
    def held(self) -> int:
        """How often weights were asked for and not given back."""
        return sum(sum(model.held.values()) for model in self.models)

    def free(self, device: Any = None, torch_free_too: bool = False) -> Any:
        """`comfy.model_management.get_free_memory`."""
        free = self.size - PAGE * self.there
        return (free, free) if torch_free_too else free

    def total(self, device: Any = None, torch_total_too: bool = False) -> Any:
        return (self.size, self.size) if torch_total_too else self.size

    def make_room(self, missing: int) -> None:
        for model in self.models if self.churn else ():
            for page in sorted(model.there):
                if self.churn and self.churn.random() < CHURN:
                    model.evict(page)
        for model in self.models:
            while self.there + missing > self.pages and model.watermark:
                model.lower()


class ModelVBAR:
    """A model's weights on the card, of which some pages are there."""

    def __init__(self, vram: Vram, size: int, device: int) -> None:
        self.vram, self.max_size, self.offset = vram, size, 0
        self.memory = bytes_of(size + PAGE)
        self.count = self.watermark = size // PAGE + 1
        self.serials: dict[int, int] = {}  # of the pages that were ever there
        self.there: set[int] = set()
        self.held: dict[int, int] = {}
        vram.models.append(self)

    def prioritize(self, *_: Any) -> None:
        self.vram.models.remove(self)
        self.vram.models.append(self)
        self.watermark = self.count

    def alloc(self, size: int) -> tuple[ModelVBAR, int, int]:
        start = (self.offset + 511) & ~511
        assert start + size <= self.max_size
        self.offset = start + size
        return self, start, size

    def loaded_size(self) -> int:
        return PAGE * len(self.there)

    def free_memory(self, size: float) -> int:
        before = self.loaded_size()
        while before - self.loaded_size() < size and self.watermark:
            self.lower()
        return before - self.loaded_size()

    def lower(self) -> None:
        self.watermark -= 1
        self.evict(self.watermark)

    def evict(self, page: int) -> None:
        if page in self.there and not self.held.get(page):
            self.there.remove(page)
            self.memory[page * PAGE : (page + 1) * PAGE].fill_(GONE)
            self.vram.evicted += 1

    def fault(self, start: int, size: int) -> list[int] | None:
        wanted = pages_of(start, size)
        self.vram.make_room(sum(page not in self.there for page in wanted))
        if wanted.stop > self.watermark:
            return None
        for page in wanted:
            if page not in self.there:
                self.there.add(page)
                self.serials[page] = self.serials.get(page, 0) + 1
                self.memory[page * PAGE : (page + 1) * PAGE].fill_(GONE)
            self.held[page] = self.held.get(page, 0) + 1
        return [self.serials[page] for page in wanted]

    def unpin(self, start: int, size: int) -> None:
        for page in pages_of(start, size):
            self.held[page] = max(0, self.held.get(page, 0) - 1)
            if page >= self.watermark:
                self.evict(page)


def pages_of(start: int, size: int) -> range:
    return range(start // PAGE, -(-(start + size) // PAGE))


def bytes_of(size: int) -> Tensor:
    """Memory that can be written to in inference mode and outside of it."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8)


class VRAMBuffer:
    def __init__(self, max_size: int, device: int) -> None:
        self.memory = bytes_of(BUFFER)

    def size(self) -> int:
        return BUFFER

    def get(self, size: int, offset: int = 0) -> tuple[VRAMBuffer, int, int]:
        self.memory[offset : offset + size].fill_(GONE)
        return self, offset, size


class HostBuffer:
    """Memory that weights are sent to the card from."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.size = size
        self.memory = bytes_of(max(size, max_grow_size))

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > len(self.memory):
            raise RuntimeError("HostBuffer.extend failed")
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.memory[size : self.size].fill_(GONE)
        self.size = size

    def get_raw_address(self) -> int:
        return self.memory.data_ptr()


class ModelMMAP:
    """A mapped file. It has no handle to give, by which the real one reads it around the computer's memory."""

    def __init__(self, path: str) -> None:
        self.bytes = np.memmap(path, np.uint8, "r")

    def get(self) -> int:
        return int(self.bytes.ctypes.data)

    def get_file_handle(self) -> None: ...

    def bounce(self) -> bool:
        return True


def on_card(place: tuple[ModelVBAR | VRAMBuffer, int, int], device: torch.device) -> Tensor:
    owner, start, size = place
    return CardTensor(owner.memory[start : start + size])


def stand_ins(vram: Vram) -> dict[str, Any]:
    return {
        "comfy_aimdo.model_vbar.ModelVBAR": partial(ModelVBAR, vram),
        "comfy_aimdo.model_vbar.vbar_fault": lambda place: place[0].fault(*place[1:]),
        "comfy_aimdo.model_vbar.vbar_unpin": lambda place: place and place[0].unpin(*place[1:]),
        "comfy_aimdo.model_vbar.vbar_signature_compare": lambda a, b: a is not None and a == b,
        "comfy_aimdo.model_vbar.vbars_analyze": lambda device=None: PAGE * vram.there,
        "comfy_aimdo.vram_buffer.VRAMBuffer": VRAMBuffer,
        "comfy_aimdo.host_buffer.HostBuffer": HostBuffer,
        "comfy_aimdo.model_mmap.ModelMMAP": ModelMMAP,
        "comfy_aimdo.torch.aimdo_to_tensor": on_card,
        "comfy_aimdo.torch.hostbuf_to_tensor": lambda buffer: buffer.memory[: buffer.size],
    }


@contextmanager
def host_with_card(
    dynamic: bool = True, pages: float = math.inf, churn: int | None = None, small_ones_too: bool = True
) -> Iterator[Vram]:
    """A host with a card to compute on, with dynamic VRAM or without. pages, churn: see `Vram`. small_ones_too: modules
    are streamed that only our tiny networks have so small."""
    management, patcher, vram = comfy.model_management, comfy.model_patcher, Vram(pages, churn)
    changes: list[tuple[Any, str, Any]] = [
        (management, "cpu_state", management.CPUState.GPU),
        (management, "vram_state", management.VRAMState.NORMAL_VRAM),
        (management, "get_torch_device", lambda: CARD),
        (management, "get_free_memory", vram.free),
        (management, "get_total_memory", vram.total),
        (management, "current_loaded_models", []),
        (management, "NUM_STREAMS", 2),  # as on NVIDIA's cards
        (management, "STREAMS", {}),
        (management, "stream_counters", {}),
        (management, "STREAM_CAST_BUFFERS", {}),
        (management, "STREAM_AIMDO_CAST_BUFFERS", {}),
        (management, "MAX_PINNED_MEMORY", ROOM),
        (management, "TOTAL_PINNED_MEMORY", 0),
    ]
    if dynamic:  # as the host's main.py turns it on
        changes.append((patcher, "CoreModelPatcher", patcher.ModelPatcherDynamic))
        changes.append((comfy.memory_management, "aimdo_enabled", True))
    if dynamic and small_ones_too:
        changes.append((patcher.ModelPatcherDynamic, "_load_list", larger))
    with ExitStack() as stack:
        for where, name, value in changes:
            stack.enter_context(patch.object(where, name, value))
        for name, stand_in in stand_ins(vram).items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(computing_card())
        yield vram


def larger(self: Any, *args: Any, **kwargs: Any) -> list[tuple]:
    """`ModelPatcherDynamic._load_list`: ..., bytes, name, module and parameters, of modules that count as large."""
    loading = super(comfy.model_patcher.ModelPatcherDynamic, self)._load_list(*args, **kwargs)
    return [(*order, size + STREAMED_ABOVE, name, module, own) for *order, size, name, module, own in loading]
