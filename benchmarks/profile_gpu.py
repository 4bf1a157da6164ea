"""Where the time of a piece of work on a GPU goes: by kind of kernel, and what the card waits for.

Rehearsed on the CPU, torch's operators stand for kernels, and those that call others are counted twice.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Row, synchronize
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

KINDS = {  # by what a kernel's name holds; the first that fits
    "attention": "flash|fmha|attention|sdpa|mha",
    "convolutions": "conv|fprop|implicit|cudnn",
    "matrix_products": "gemm|nvjet|cutlass|cublas|xmma|splitk|aten::(add)?mm$|aten::linear$|aten::(b|addb)mm$",
    "fused": "_residual_modulated_norm|_gated_residual_norm|_rms_norm_rope",
    "copies_and_casts": "memcpy|memset|copy|catarray|aten::(_to_copy|to|cat)$",
    "norms_and_elementwise": "",
}
TOP = 25  # kernels that are listed


@dataclass(frozen=True)
class Profile:
    """Seconds."""

    wall: float
    busy: float  # while at least one kernel ran
    kernels: dict[str, tuple[float, int]]  # by name: in all, and how often

    def kinds(self) -> dict[str, float]:
        times = dict.fromkeys(KINDS, 0.0)
        for name, (took, _) in self.kernels.items():
            times[kind(name)] += took
        return times


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def profile(work: Callable[[], Any]) -> Profile:
    """Of one call, warmed up by another."""
    work()
    synchronize()
    card = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if card else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        synchronize()
        wall = time.perf_counter() - start
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == (DeviceType.CUDA if card else DeviceType.CPU) and event.duration_ns() > 0
    )
    kernels: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    busy, until = 0, 0
    for begin, end, name in spans:
        took, count = kernels[name]
        kernels[name] = took + (end - begin) / 1e9, count + 1
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return Profile(wall, busy / 1e9, dict(kernels))


def rows(name: str, ours: Profile, theirs: Profile, peer: str = "eager") -> Iterator[Row]:
    """Seconds of both by kind. Their sum is more than busy where kernels ran beside each other."""
    times = {"wall": (ours.wall, theirs.wall), "idle": (ours.wall - ours.busy, theirs.wall - theirs.busy)}
    for kind, took in ours.kinds().items():
        times[kind] = (took, theirs.kinds()[kind])
    for kind, (mine, other) in times.items():
        note = f"{100 * mine / ours.wall:.1f} %, of {peer} {100 * other / theirs.wall:.1f} %"
        yield Row(f"{name}_{kind}", mine, other, "s", other / mine if mine else None, note)


def append(file: Path, profiles: dict[str, Profile]) -> None:
    """The kernels that take longest, to a text file."""
    with file.open("a", encoding="utf-8") as text:
        for title, found in profiles.items():
            text.write(f"{title}: {found.wall * 1e3:.1f} ms, idle {(found.wall - found.busy) * 1e3:.1f} ms\n")
            text.writelines(f"  {name:22} {took * 1e3:9.2f} ms\n" for name, took in found.kinds().items())
            longest = sorted(found.kernels.items(), key=lambda item: -item[1][0])[:TOP]
            for name, (took, count) in longest:
                text.write(
                    f"  {took * 1e3:9.2f} ms {count:6} x {took / count * 1e6:8.1f} us  {kind(name)}: {name[:160]}\n"
                )
            text.write("\n")
