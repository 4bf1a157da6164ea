"""A card that computes: tensors that say they are on `cuda`, and whose values lie in the computer's memory.

What is done with them the CPU's kernels do, so that a run has the very numbers that it has without a card; and it is
done only where a card would do it: a tensor that was left on the CPU is an AssertionError. Here no two things happen at
once, as they do on a card.

For what comes out of a run there. What crosses between host and card: `support.pretended_card`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_helios.helios_core import elementwise
from support.pretended_card import CARD, describe, move, tensors_in

aten = torch.ops.aten
ACROSS = (aten._to_copy.default, aten.copy_.default)


class CardTensor(Tensor):
    """Says that it is on the card; `on_cpu`, of the same shape and strides, has its values."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CardTensor:
        layout = values.shape, values.stride(), values.storage_offset()
        x: CardTensor = Tensor._make_wrapper_subclass(cls, *layout, dtype=values.dtype, device=CARD)
        x.on_cpu = values
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(func, types, args, kwargs or {})


class ComputingCard(TorchDispatchMode):
    """While it lasts, what this thread makes on `cuda` or copies there is a CardTensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if any(is_card(x) for x in (*args, *kwargs.values())) and func._can_decompose():  # `to`, in its many spellings
            with self:
                return func.decompose(*args, **kwargs)
        return compute(func, types, args, kwargs)


def compute(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    if not all(kind in (Tensor, nn.Parameter) or issubclass(kind, CardTensor) for kind in types):
        return NotImplemented  # another kind of tensor, with ours inside: it takes itself apart
    given = list(tensors_in((*args, *kwargs.values())))
    on_card = [x for x in given if isinstance(x, CardTensor)]
    for x in given if on_card and func not in ACROSS else ():
        if x.ndim and not isinstance(x, CardTensor):  # without axes it is a number, which kernels take
            raise AssertionError(f"A tensor was left on the CPU, {describe(x)}, in {func}")
    goes_to_card = bool(on_card) if kwargs.get("device") is None else is_card(torch.device(kwargs["device"]))
    if func is aten.copy_.default:
        goes_to_card = isinstance(args[0], CardTensor)
    known = {id(x.on_cpu): x for x in on_card}

    def lower(x: Any) -> Any:
        if isinstance(x, CardTensor):
            return x.on_cpu
        return torch.device("cpu") if is_card(x) else x

    def lift(x: Any) -> Any:
        if not isinstance(x, Tensor) or not goes_to_card:
            return x
        if id(x) in known:  # written to in place
            return known[id(x)]
        with torch.inference_mode(x.is_inference()):
            return CardTensor(x)

    return each(lift, func(*each(lower, args), **{name: each(lower, x) for name, x in kwargs.items()}))


def each(function: Callable[[Any], Any], x: Any) -> Any:
    """A value of an operation's, or a list of such."""
    return type(x)(each(function, part) for part in x) if isinstance(x, list | tuple) else function(x)


def is_card(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == CARD.type


class Stream:
    """One of the card's queues, or an event in it: everything here is done when it is asked for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Stream) -> None: ...

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None: ...


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    yield


class Generator(torch.Generator):
    """The card's: it draws what the CPU's draws."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


ANSWERS: dict[str, Any] = {
    "_lazy_init": lambda: None,  # it looks for a driver before anything is moved to a card
    "synchronize": lambda *_: None,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "get_device_properties": lambda *_: SimpleNamespace(major=8, minor=6, name="computing"),  # without fp8 products
    "current_stream": lambda *_: Stream(),
    "Stream": Stream,
    "stream": on_stream,
    # 0 is success: memory has been locked for transfers.
    "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
}


@contextmanager
def computing_card() -> Iterator[None]:
    """While the context lasts, this thread has a `cuda:0`, on which no kernels of Triton run, and infers."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "_apply", move))
        stack.enter_context(patch.object(elementwise, "_fused", lambda device, dtype: None))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        # As torch's own fake tensors do: no driver is asked to switch cards, and `torch.tensor` copies to one at last.
        torch._C._ensureCUDADeviceGuardSet()
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(ComputingCard())
        stack.enter_context(torch.inference_mode())
        yield
