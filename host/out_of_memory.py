"""Too little memory: refused before work starts where the need can be computed, else one sentence in place of many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import psutil  # type: ignore[import-untyped]
import torch

from ..helios_core.quoting import known_by_its_name

GIB = 1024**3
CURE = (
    "Make the video smaller (width, height, batch_size) or shorter, or switch group_offload on; the memory of Helios "
    "Stream Video does not grow with the length."
)
# The words of torch's allocators, of oneDNN and, in another process's log, of Python; then of Apple's, Intel's and
# DirectML's devices. A primitive *descriptor* that cannot be made is another matter.
RAN_OUT = re.compile(
    r"DefaultCPUAllocator|out of memory|MemoryError|_ALLOC_FAILED"
    r"|could not create a (primitive(?! desc)|memory object)"
    r"|Invalid buffer size|_OUT_OF_(DEVICE_MEMORY|HOST_MEMORY|RESOURCES)|not enough GPU video memory",
    re.I,
)
ASKED = re.compile(r"(?:tried to allocate|invalid buffer size:) (\d+ bytes|[\d.]+ \wi?B)", re.I)


@known_by_its_name
class OutOfMemory(comfy.model_management.OOM_EXCEPTION):
    """Told in one sentence. The host then unloads all models, which it does not for errors of the CPU's allocator."""


def ran_out(what: str, said: str, cure: str = CURE) -> OutOfMemory:
    """what: ran out of memory; said: in the words of who has it."""
    asked = ASKED.search(said)
    more = f" when it asked for {asked[1]} more" if asked else ""
    return OutOfMemory(f"{what} ran out of memory{more}. {cure}")


@contextmanager
def memory_errors(what: str, cure: str = CURE) -> Iterator[None]:
    """Turn the many words for a lack of memory into one sentence, but for what is told in one already."""
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and not RAN_OUT.search(str(error)):
            raise
        raise ran_out(what, str(error), cure) from error


def check_room(what: str, needed: float, device: torch.device, cure: str = CURE) -> None:
    """Raise ValueError where the device cannot hold so many bytes."""
    if lack := lack_of_room(what, needed, device, cure):
        raise ValueError(lack)


def lack_of_room(what: str, needed: float, device: torch.device, cure: str = CURE) -> str | None:
    """That the device cannot hold so many bytes, in words; None where it can.

    On the CPU what is free counts, swap included; on a card all of it, since the host puts models out to make room.
    """
    if device.type == "privateuseone":  # DirectML does not tell, and the host (0.3.75 to 0.33) answers 1 GiB for it
        return None
    if comfy.model_management.is_device_cpu(device):
        room, of = psutil.virtual_memory().available + psutil.swap_memory().free, "free"
    else:
        room, of = comfy.model_management.get_total_memory(device), f"there on {device}"
    if needed <= room:
        return None
    return f"{what} would take {needed / GIB:.1f} GiB of memory, and {room / GIB:.1f} GiB are {of}. {cure}"
