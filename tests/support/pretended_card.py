"""A pretended graphics card: torch's fake tensors on `cuda`, and a list of all that crosses between it and the host.

What lies on the CPU is real: schedules, noise and files are what they are. What lies on the card has a shape, a dtype
and a device, and no values. What comes down from it is zeros; a number that is asked of it is 1, an answer True.

For what lies where, and how often anything waits. Where values matter: `support.computing_card`.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from comfyui_helios.helios_core import elementwise, rope, solver
from comfyui_helios.helios_core.generate import Step

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is built without CUDA: it cannot pretend a card"
)

aten = torch.ops.aten
CARD = torch.device("cuda:0")
OURS = Path(__file__).resolve().parents[2]
PACK = tuple(str(OURS / floor) for floor in ("helios_core", "host", "nodes"))

# Python cannot know how many values come back before the card has counted them, or what an answer is.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
WITH_MASKS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

# What is float32 in a network of any dtype; layer norms are, whether they have weights or not.
FLOAT32_WEIGHTS = re.compile(r"time_embedder\.|scale_shift_table\.|\.norm2\.|history_key_scale\.")
FLOAT32 = re.compile(r"condition_embedder\.time_embedder(\..*)?|blocks\.\d+\.norm2")
TABLES = re.compile(r"(.*\.)?scale_shift_table")  # return float32, whatever they are added to
FLOAT64 = {"dmd_step"}  # as in the reference


@dataclass(frozen=True)
class Place:
    """A line of code, and the functions that it is known by."""

    name: str  # our function; behind ">" the host's that it has called, where it is in there
    lines: tuple[str, ...]  # innermost first

    def __str__(self) -> str:
        return "\n    called from ".join(self.lines)


@dataclass(frozen=True)
class Crossing:
    kind: Literal["up", "down", "wait"]  # to the card, from the card, for an answer of the card
    what: str
    place: Place

    def __str__(self) -> str:
        return f"{self.what}\n    at {self.place}"

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.place.name}"


@contextmanager
def pretended_card(host: Path | None = None) -> Iterator[Card]:
    """While the context lasts, this thread has a `cuda:0`, on which no kernels of Triton run. host is where the host's
    own code lies."""
    roots = (*PACK, str(host)) if host else PACK
    plain = patch.object(elementwise, "_fused", lambda device, dtype: None)
    with patch.object(nn.Module, "_apply", move), plain, FakeTensorMode() as fake, Card(fake, roots) as card:
        yield card


@contextmanager
def without_wide_numbers(card: Card) -> Iterator[None]:
    """While the context lasts, the card has neither float64 nor complex numbers, like Apple's, and is known for it."""
    plain = patch.object(rope, "COMPLEX", ("cpu",))
    with patch.object(solver, "NO_FLOAT64", (CARD.type,)), plain, patch.object(card, "wide", False):
        yield


def move(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`; torch's own swaps fake parameters in place, and fails where there are weak references."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (moved := function(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(moved, requires_grad=False)
    return module


class Card(TorchDispatchMode):
    """Sends what is on the card to fake tensors and the rest to the CPU; `crossings` lists what goes up and down."""

    def __init__(self, fake: FakeTensorMode, roots: tuple[str, ...]) -> None:
        super().__init__()
        self.fake, self.roots = fake, roots
        self.crossings: list[Crossing] = []
        self.wide = True  # float64 and complex numbers exist
        self.kernels: set[str] = set()  # operations that ran on it, as torch's own list of them spells them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere torch has taken it apart already
            with self:
                return func.decompose(*args, **kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        on_card = [x for x in tensors if x.device.type == "cuda"]
        left = [x for x in tensors if x.device.type == "cpu"]
        target = torch.device(kwargs.get("device") or "cpu")
        if not on_card and target.type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._to_copy.default and "device" in kwargs and target.type != args[0].device.type:
            return self._copy(args[0], target, kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and on_card and left:
            return self._copy_into(*args[:2])
        for x in left if on_card else ():
            if x.ndim:  # without axes it is a number, which kernels take
                raise AssertionError(f"A tensor was left on the CPU, {describe(x)}, in {func} at {self._place()}")
        if left:
            args, kwargs = tree_map_only(Tensor, self.fake.from_tensor, (args, kwargs))
        if on_card and waits(func, args):
            return self._answer(func, on_card[0])
        self.kernels.add(func.name().removeprefix("aten::"))
        result = func(*args, **kwargs)
        dtypes = {x.dtype for x in tensors_in((result,))}
        if torch.float64 in dtypes and not (self.wide and self._in(FLOAT64)):
            raise AssertionError(f"float64 on the card, in {func} at {self._place()}")
        if any(dtype.is_complex for dtype in dtypes) and not self.wide:
            raise AssertionError(f"Complex numbers on the card, in {func} at {self._place()}")
        if func is aten.native_layer_norm.default and args[0].dtype != torch.float32:
            raise AssertionError(f"A layer norm of {describe(args[0])}, expected torch.float32, at {self._place()}")
        return result

    def check(self, allowed: Mapping[str, int | None]) -> None:
        """Raise AssertionError for what crossed and is not in allowed, or not as often; None is any number."""
        found: dict[str, list[Crossing]] = {name: [] for name in allowed}
        for crossing in self.crossings:
            found.setdefault(crossing.name, []).append(crossing)
        told = [
            f"{name}, {len(group)} times, {allowed.get(name, 0)} expected" + (f": {group[0]}" if group else "")
            for name, group in found.items()
            if allowed.get(name, 0) not in (None, len(group))
        ]
        assert not told, "\n".join(["Between host and card:", *told])

    def _copy(self, x: Tensor, target: torch.device, dtype: torch.dtype) -> Tensor:
        self._note("up" if target.type == "cuda" else "down", aten._to_copy.default, x)
        if target.type == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(x.shape, dtype=dtype)
        return torch.empty(x.shape, dtype=dtype, device=target)

    def _copy_into(self, target: Tensor, x: Tensor) -> Tensor:
        self._note("down" if target.device.type == "cpu" else "up", aten.copy_.default, x)
        if target.device.type == "cpu":
            with unset_fake_temporarily():
                target.zero_()
        return target

    def _answer(self, func: Any, x: Tensor) -> bool | int | float:
        self._note("wait", func, x)
        if torch.Tag.data_dependent_output not in func.tags:
            raise AssertionError(f"A size that only the card knows: {func} of {describe(x)} at {self._place()}")
        if func is not aten._local_scalar_dense.default or x.dtype == torch.bool:
            return True
        return 1.0 if x.is_floating_point() else 1

    def _note(self, kind: Literal["up", "down", "wait"], func: Any, x: Tensor) -> None:
        self.crossings.append(Crossing(kind, f"{func} of {describe(x)}", self._place()))

    def _in(self, names: Collection[str]) -> bool:
        return any(name_of(frame) in names for frame in self._frames())

    def _frames(self) -> Iterator[FrameType]:
        """Of the pack and the host, innermost first."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.roots):
                yield frame
            frame = frame.f_back

    def _place(self) -> Place:
        frames = []
        for frame in self._frames():
            frames.append(frame)
            if frame.f_code.co_filename.startswith(PACK):
                break
        inner, ours = (name_of(frames[0]), name_of(frames[-1])) if frames else ("the test", "the test")
        return Place(ours if inner == ours else f"{ours} > {inner}", tuple(map(line_of, frames)))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)


def waits(func: Any, args: Any) -> bool:
    """Whether an operation on the card makes the host wait for what comes out of it."""
    if func in WITH_MASKS:
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
    return not WAITS.isdisjoint(func.tags)


def name_of(frame: FrameType) -> str:
    return frame.f_code.co_qualname.partition(".<locals>")[0]


def line_of(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    source = linecache.getline(str(file), frame.f_lineno).strip()
    return f"{file.parent.name}/{file.name}:{frame.f_lineno} in {name_of(frame)}: {source}"


def describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def watch_dtypes(network: nn.Module, dtype: torch.dtype) -> None:
    """Let every part of a network raise AssertionError for a tensor that is not in the dtype it is to compute in.

    The weights are looked at now, wherever they lie.
    """
    for name, weight in network.named_parameters():
        wanted = torch.float32 if FLOAT32_WEIGHTS.search(name) else dtype
        assert weight.dtype == wanted, f"{name} is {weight.dtype}; expected {wanted}"

    def watch(name: str, inputs: Any, output: Any) -> None:
        wanted = torch.float32 if FLOAT32.fullmatch(name) else dtype
        given = tensors_in(inputs)
        if re.fullmatch(r"blocks\.\d+", name):
            x, text, time, rope, *_ = inputs
            given = tensors_in((x, text, time.history, time.noisy))
            check_tensor(f"{name} is given the rope table", rope, torch.float32)
        for x in given:
            check_tensor(f"{name} is given", x, wanted)
        check_tensor(f"{name} returns", output, torch.float32 if TABLES.fullmatch(name) else wanted)

    for name, module in network.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.Sequential):
            module.register_forward_hook(lambda module, inputs, output, name=name: watch(name, inputs, output))


def check_step(step: Step) -> None:
    """Raise AssertionError unless all tensors of a step are float32 on the card."""
    for name in ("latents", "flow", "result"):
        check_tensor(f"{name} of the step at sigma {step.sigma:.4g} is", getattr(step, name), torch.float32)


def check_tensor(what: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.device != CARD:
        raise AssertionError(f"{what} {describe(x)}; expected {dtype} on {CARD}")
