"""Too little memory: refused before work starts where the need can be computed, else one sentence in place of many."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import psutil  # type: ignore[import-untyped]  # comes with ComfyUI
import torch

GIB = 1024**3
CURE = (
    "Make the video smaller (width, height, batch_size) or shorter, or switch group_offload on; the memory of Helios "
    "Stream Video does not grow with the length."
)
# The words of torch's allocators and of oneDNN. A primitive *descriptor* that cannot be made is another matter.
RAN_OUT = re.compile(
    r"DefaultCPUAllocator|out of memory|_ALLOC_FAILED|could not create a (primitive(?! desc)|memory object)", re.I
)
ASKED = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ \wi?B)", re.I)


@contextmanager
def memory_errors(what: str, cure: str = CURE) -> Iterator[None]:
    """Turn the many words for a lack of memory into one sentence, raised as what the host takes for it.

    what: ran out of it. The host then unloads all models, which it does not for those of the CPU's allocator.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not RAN_OUT.search(str(error)):
            raise
        asked = ASKED.search(str(error))
        more = f" when it asked for {asked[1]} more" if asked else ""
        raise comfy.model_management.OOM_EXCEPTION(f"{what} ran out of memory{more}. {cure}") from error


def check_room(what: str, needed: float, device: torch.device, cure: str = CURE) -> None:
    """Raise ValueError where the device cannot hold so many bytes.

    On the CPU what is free counts, swap included; on a card all of it, since the host puts models out to make room.
    """
    if comfy.model_management.is_device_cpu(device):
        room, of = psutil.virtual_memory().available + psutil.swap_memory().free, "free"
    else:
        room, of = comfy.model_management.get_total_memory(device), f"there on {device}"
    if needed > room:
        raise ValueError(
            f"{what} would take {needed / GIB:.1f} GiB of memory, and {room / GIB:.1f} GiB are {of}. {cure}"
        )
