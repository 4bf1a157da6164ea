"""What server and workers say to each other: a header in JSON and tensors as safetensors, through pipes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from ...helios_core.history import FrameIndices, History

TENSORS = ("long", "mid", "short")  # of a History
LENGTHS = struct.Struct("<QQ")  # of header and tensors

Message = tuple[dict[str, Any], dict[str, Tensor]]


def send(stream: BinaryIO, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    stream.write(packed(header, tensors))
    stream.flush()


def packed(header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    text = json.dumps(header).encode()
    # A copy of each: safetensors refuses parts of one tensor.
    whole = {name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in (tensors or {}).items()}
    body = safetensors.torch.save(whole) if whole else b""
    return LENGTHS.pack(len(text), len(body)) + text + body


def receive(stream: BinaryIO) -> Message | None:
    """The next message, with tensors on the CPU; None where the other side is gone."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header, body = LENGTHS.unpack(lengths)
    text, tensors = stream.read(header), stream.read(body)
    if len(text) < header or len(tensors) < body:
        return None
    return json.loads(text), safetensors.torch.load(tensors) if tensors else {}


def taken_apart(history: History) -> Message:
    return {"indices": asdict(history.indices)}, {name: getattr(history, name) for name in TENSORS}


def put_together(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> History:
    long, mid, short = (tensors[name] for name in TENSORS)
    indices = FrameIndices(**{name: tuple(frames) for name, frames in header["indices"].items()})
    return History(long, mid, short, indices)
