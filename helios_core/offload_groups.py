"""The pieces that group offloading moves: weights, the groups they travel in, and where in host memory a group lies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 256  # bytes; where a tensor may begin in a buffer
MADV_WILLNEED = 3


@dataclass(eq=False)
class Weight:
    """One parameter: who has it, and where it lies in its group's buffer."""

    name: str
    owners: list[tuple[nn.Module, str]]  # more than one where modules share it
    own: nn.Parameter
    dtype: torch.dtype  # that it computes in
    offset: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary tensor, and can be had in `dtype`, unlike tensor classes for quantised weights."""
        return type(self.own.data) is Tensor

    @property
    def parts(self) -> list[Tensor]:
        """The plain tensors that hold its values: one, or those inside of a tensor class for quantised weights.

        Empty where the class does not show them.
        """
        if self.is_plain:
            return [self.own.data]
        return [getattr(self.own, name) for name in self._flat()[0]] if is_traceable_wrapper_subclass(self.own) else []

    @property
    def sizes(self) -> list[int]:
        """Bytes of the parts in a buffer."""
        if self.is_plain:
            return [self.own.numel() * self.dtype.itemsize]
        return [part.nbytes for part in self.parts]

    @property
    def size(self) -> int:
        return sum(self.sizes) or self.own.numel() * self.dtype.itemsize

    def renew(self) -> bool:
        """Take over the parameter that the owner has now; returns whether it is another one than before."""
        module, name = self.owners[0]
        before, self.own = self.own, module._parameters[name]  # type: ignore[assignment]  # never None
        return self.own is not before

    def place(self, parameter: nn.Parameter) -> None:
        for module, name in self.owners:
            module._parameters[name] = parameter

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parts' places in a buffer."""
        views, start = [], self.offset
        for part, size in zip(self.parts, self.sizes, strict=True):
            dtype = self.dtype if self.is_plain else part.dtype
            views.append(buffer[start : start + size].view(dtype).view(part.shape))
            start += _aligned(size)
        return views

    def made_of(self, parts: list[Tensor]) -> nn.Parameter:
        """The parameter with these parts in place of its own."""
        if self.is_plain:
            return nn.Parameter(parts[0], requires_grad=False)
        names, context = self._flat()
        # What is made outside of inference mode of such a class cannot be used within.
        with torch.inference_mode():
            inner = dict(zip(names, parts, strict=True))
            whole = type(self.own).__tensor_unflatten__(inner, context, self.own.size(), self.own.stride())  # type: ignore[attr-defined]
            return nn.Parameter(whole, requires_grad=False)

    def on_device(self, device: torch.device) -> nn.Parameter:
        """The parameter outside of the buffers."""
        if self.is_plain:
            return self.made_of([self.own.data.to(device, self.dtype)])
        if parts := self.parts:
            return self.made_of([part.to(device) for part in parts])
        return nn.Parameter(self.own.data.to(device), requires_grad=False)

    def _flat(self) -> Any:
        return self.own.__tensor_flatten__()  # type: ignore[attr-defined]


class HostBuffer:
    """Host memory in one piece, locked in place where the driver agrees: never a second copy of what is in it."""

    def __init__(self, size: int, pin: bool):
        self.bytes = torch.empty(size, dtype=torch.uint8)
        address = self.bytes.data_ptr()
        # Not torch's own pinned memory: its allocator rounds up to a power of two.
        self.pinned = pin and int(torch.cuda.cudart().cudaHostRegister(address, size, 1)) == 0
        if self.pinned:
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
        elif pin:
            _forget_cuda_error()


def _forget_cuda_error() -> None:
    """Take back the error of a refused registration: CUDA keeps it, and any next operation would raise it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


class Group:
    """Layers whose weights are copied to the device together, into one buffer."""

    def __init__(self, name: str, modules: list[nn.Module], weights: list[Weight]):
        self.name, self.modules, self.weights = name, modules, weights
        self.host: HostBuffer | None = None  # its weights in one piece, once they are gathered
        self.in_buffer = [weight for weight in weights if weight.parts]
        self.size = 0
        for weight in self.in_buffer:
            weight.offset = self.size
            self.size += sum(map(_aligned, weight.sizes))

    def renew(self) -> None:
        renewed = [weight.renew() for weight in self.weights]
        if any(renewed):
            self.host = None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_groups(
    module: nn.Module, layers: Iterator[tuple[str, list[nn.Module]]], dtype: torch.dtype | None, keep_below: int
) -> tuple[list[Group], list[Weight]]:
    """Groups of the module's layers, and the weights that are in none: those stay on the device."""
    weights: dict[int, Weight] = {}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            cast = dtype if dtype and parameter.is_floating_point() else parameter.dtype
            weight = Weight(f"{path}.{name}" if path else name, [], parameter, cast)
            weights.setdefault(id(parameter), weight).owners.append((owner, name))
    groups = []
    for name, modules in layers:
        inner = {id(m) for module in modules for m in module.modules()}
        members = {id(p) for module in modules for p in module.parameters()}
        group = Group(name, modules, [weight for i, weight in weights.items() if i in members])
        shared = any(id(owner) not in inner for weight in group.weights for owner, _ in weight.owners)
        if shared or not group.weights or sum(weight.size for weight in group.weights) < keep_below:
            continue
        groups.append(group)
        for i in members:
            del weights[i]
    return groups, list(weights.values())


def block_lists(module: nn.Module, blocks_per_group: int, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """Names and layers of the groups at level `block`: consecutive entries of the outermost lists of modules."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            entries = [entry for entry in child if any(True for _ in entry.parameters())]
            for start in range(0, len(entries), blocks_per_group):
                yield f"{prefix}{name}.{start}", entries[start : start + blocks_per_group]
        else:
            yield from block_lists(child, blocks_per_group, f"{prefix}{name}.")


def single_layers(module: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for name, layer in module.named_modules():
        # Text encoders ask their embedding's weights which device tokens go to.
        if not isinstance(layer, nn.Embedding) and not any(True for _ in layer.children()):
            yield name, [layer]


def read_ahead(weights: list[Weight]) -> None:
    """Tell Linux that these will be needed soon: it reads meanwhile what is mapped from disk."""
    if sys.platform != "linux":
        return
    for part in (part for weight in weights for part in weight.parts):
        start = part.data_ptr()
        page = start - start % mmap.PAGESIZE
        size = start + part.nbytes - page
        _libc().madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), MADV_WILLNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
