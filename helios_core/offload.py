"""Group offloading: a model larger than the device's memory runs there a few layers at a time.

The weights stay where they are, in host memory or in a mapped file, and exist there once. The device holds two
buffers: while the layers of one group compute from the first, a thread copies the next group into the second, on a
stream of its own. Parameters never become meta tensors: outside of its own forward a layer has its own weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Literal, get_args

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from .devices import TWO_THREADS
from .offload_groups import Group, HostBuffer, Weight, block_lists, plan_groups, read_ahead, single_layers

Level = Literal["block", "leaf"]

KEEP_BELOW = 1 << 20  # bytes; groups smaller than this are not worth the trip

Transform = Callable[[Tensor], Tensor]
"""A parameter's values on the device -> the values to compute with, new ones, of the same shape and dtype.

Not for weights of tensor classes."""


class _Slot:
    """One of the device's two buffers, and the group that is in it or on its way."""

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.staging: HostBuffer | None = None
        self.group: Group | None = None
        self.arrival: Future[None] | None = None
        self.placed = False  # the group's layers have their weights in this buffer
        self.copied: torch.cuda.Event | None = None  # the last copy into the buffer
        self.used: torch.cuda.Event | None = None  # the last computation from it


class Offloader:
    """Runs `module` on `device`, its large layers travelling there when they are due.

    level: `block` moves `blocks_per_group` consecutive entries of the outermost ModuleLists and Sequentials at a time;
    `leaf` moves single layers, which takes the least memory. Layers outside of such lists (block), embeddings (leaf),
    parameters that modules share or have beside children, and groups below `keep_below` bytes stay on the device.
    gather: bring the weights of each group together in one piece of host memory, pinned while that takes no more than
    `pin_limit` bytes in all. Else they stay as they are, on disk if they are memory-mapped, are read ahead, and go
    through two small pinned buffers.
    dtype: floating-point weights compute in this one instead of their own; they are not gathered then.
    transforms: by parameter name, what is done to weights each time they have arrived on the device.
    Buffers of the modules stay where they are.

    A context manager, or `install` and `remove`: after `remove` nothing is left on the modules, whatever happened.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str,
        *,
        level: Level = "block",
        blocks_per_group: int = 1,
        gather: bool = True,
        dtype: torch.dtype | None = None,
        transforms: Mapping[str, Transform] | None = None,
        keep_below: int = KEEP_BELOW,
        pin_limit: int = sys.maxsize,
    ):
        if level not in get_args(Level) or blocks_per_group < 1:
            raise ValueError(
                f"Group offloading takes a level of {' or '.join(get_args(Level))} and at least 1 block a group, "
                f"got {level!r} and {blocks_per_group}."
            )
        self.device = torch.device(device)
        self.gather = gather and dtype is None
        self.transforms: Mapping[str, Transform] = transforms or {}
        self.pin_limit = pin_limit
        groups = single_layers(module) if level == "leaf" else block_lists(module, blocks_per_group)
        self.groups, self.kept = plan_groups(module, groups, dtype, keep_below)
        self.buffer_size = max((group.size for group in self.groups), default=0)
        self.buffers = min(2, len(self.groups))
        self.kept_size = sum(weight.size for weight in self.kept)
        self.moved = self.peak = 0  # bytes: copied to the device so far, and the most that was there at once
        self.installed = False
        self._slots: list[_Slot] = []
        self._stream: torch.cuda.Stream | None = None
        self._own_forward: set[nn.Module] = set()  # layers whose instance has a forward that is not its class's

    @property
    def device_size(self) -> int:
        """Bytes of device memory it takes while installed, activations not counted."""
        return self.kept_size + self.buffers * self.buffer_size

    @property
    def pinned(self) -> int:
        """Bytes of host memory locked for fast copies."""
        return sum(group.size for group in self.groups if group.host and group.host.pinned)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the groups that are in the buffers, or on their way there."""
        return tuple(slot.group.name for slot in self._slots if slot.group)

    @property
    def used(self) -> int:
        """Bytes of weights on the device, or on their way there, at this moment."""
        travelling = [weight.size for slot in self._slots if slot.group for weight in slot.group.weights]
        return (self.kept_size if self.installed else 0) + sum(travelling)

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside of it
    @torch.no_grad()
    def install(self) -> None:
        """Allocate the buffers, bring what stays on the device there, and hook the layers."""
        if self.installed:
            return
        self.installed = True
        threaded = self.device.type in TWO_THREADS
        self._worker: Executor = ThreadPoolExecutor(1, "helios-offload") if threaded else _AtOnce()
        self._successor = dict(zip(self.groups, self.groups[1:] + self.groups[:1], strict=True))
        self._current: Group | None = None
        try:
            self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            for group in self.groups:
                group.renew()
                if self.gather:
                    self._gather(group)
            for weight in self.kept:
                weight.renew()
            for _ in range(self.buffers):
                self._slots.append(_Slot(self.buffer_size, self.device))
            if self._stream:  # what had this memory before may still be computing
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            if self._stream and not all(group.host and group.host.pinned for group in self.groups):
                for slot in self._slots:
                    slot.staging = HostBuffer(self.buffer_size, pin=True)
            for weight in self.kept:
                weight.place(self._on_device(weight))
            for group in self.groups:
                self._own_forward.update(module for module in group.modules if "forward" in module.__dict__)
                for module in group.modules:
                    add_hook_to_module(module, _GroupHook(self, group))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give every layer its own weights back and free the device. Safe at any time, and twice."""
        if not self.installed:
            return
        self.installed = False
        self._worker.shutdown(wait=True, cancel_futures=True)
        for group in self.groups:
            for module in group.modules:
                if hasattr(module, "_hf_hook"):
                    remove_hook_from_module(module)
                    if module not in self._own_forward:
                        del module.forward  # accelerate leaves the class's own method there
        self._own_forward.clear()
        for weight in (*self.kept, *(weight for group in self.groups for weight in group.weights)):
            weight.place(weight.own)
        if self._stream:
            self._stream.synchronize()
            torch.cuda.current_stream(self.device).synchronize()
        self._slots.clear()

    def __enter__(self) -> Offloader:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self, group: Group) -> None:
        """Before a layer of the group computes: its weights are there, and the next group's are on their way."""
        if self._current is not None and self._current is not group:
            self._successor[self._current] = group  # in which order the model calls its layers is learnt
        self._current = group
        slot = next((slot for slot in self._slots if slot.group is group), None)
        if slot is None:  # not foreseen
            slot = self._slots[0]
            self._send(group, slot)
        self._receive(slot)
        self._slots.sort(key=lambda x: x is slot)  # the first may be overwritten
        coming = self._successor[group]
        if all(slot.group is not coming for slot in self._slots):
            self._send(coming, self._slots[0])

    def leave(self, group: Group) -> None:
        """After a layer of the group: its buffer may be overwritten from this point of the stream on."""
        if self._stream:
            for slot in self._slots:
                if slot.group is group:
                    slot.used = torch.cuda.current_stream(self.device).record_event()

    def _send(self, group: Group, slot: _Slot) -> None:
        """Start to copy a group into a slot. The layers of the group that was there get their own weights back."""
        if slot.arrival is not None:
            slot.arrival.exception()  # of a copy that nobody came for
        for weight in slot.group.weights if slot.group else ():
            weight.place(weight.own)
        slot.group, slot.placed = None, False
        self.moved += group.size
        slot.arrival = self._worker.submit(self._copy, group, slot)
        slot.group = group  # only now: an interrupt may have come out of it
        self.peak = max(self.peak, self.used)

    def _receive(self, slot: _Slot) -> None:
        """Wait for a slot's group and give its layers the weights that are there."""
        if slot.placed:
            return
        assert slot.arrival is not None and slot.group is not None
        try:
            slot.arrival.result()
        except BaseException:
            slot.group = None
            raise
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        for weight in slot.group.weights:
            weight.place(self._in_slot(weight, slot) if weight.parts else self._on_device(weight))
        slot.placed = True

    @torch.no_grad()
    def _copy(self, group: Group, slot: _Slot) -> None:
        """By the worker: a group's weights into a slot's buffer."""
        read_ahead(self._successor[group].in_buffer)
        if self._stream is None:
            self._fill(slot.buffer, group)
            return
        with torch.cuda.stream(self._stream):
            source = group.host
            if source is None or not source.pinned:
                assert slot.staging is not None
                if slot.copied is not None:
                    slot.copied.synchronize()  # until then it is still being read
                source = slot.staging
                self._fill(source.bytes, group)
            if slot.used is not None:
                self._stream.wait_event(slot.used)
            slot.buffer[: group.size].copy_(source.bytes[: group.size], non_blocking=True)
            slot.copied = self._stream.record_event()

    def _fill(self, buffer: Tensor, group: Group) -> None:
        for weight in group.in_buffer:
            for view, part in zip(weight.views(buffer), weight.parts, strict=True):
                view.copy_(part)

    def _in_slot(self, weight: Weight, slot: _Slot) -> nn.Parameter:
        views = weight.views(slot.buffer)
        if transform := self.transforms.get(weight.name):
            views[0].copy_(transform(views[0]))
        return weight.made_of(views)

    def _on_device(self, weight: Weight) -> nn.Parameter:
        """A parameter on the device, outside of the buffers."""
        parameter = weight.on_device(self.device)
        if transform := self.transforms.get(weight.name):
            return nn.Parameter(transform(parameter.data), requires_grad=False)
        return parameter

    def _gather(self, group: Group) -> None:
        """Bring a group's weights together and let the layers have them there: what they had before is given back."""
        if group.host is not None or not group.size:
            return
        host = HostBuffer(group.size, pin=self._stream is not None and self.pinned + group.size <= self.pin_limit)
        self._fill(host.bytes, group)
        for weight in group.in_buffer:
            weight.own = weight.made_of(weight.views(host.bytes))
            weight.place(weight.own)
        group.host = host


class _AtOnce(Executor):
    """Works on the thread that asks, before it answers."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it is raised again where it is waited for
            done.set_exception(error)
        return done


class _GroupHook(ModelHook):
    def __init__(self, offloader: Offloader, group: Group):
        self.offloader, self.group = offloader, group

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.offloader.enter(self.group)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.offloader.leave(self.group)
        return output
