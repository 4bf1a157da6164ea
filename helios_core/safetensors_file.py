"""safetensors files: their headers, and their tensors one at a time.

Parsed and mapped here instead of with `safetensors.safe_open`: its private mapping of a whole file counts against
memory on Linux, which refuses it for a file larger than RAM and swap together.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
SHOWN = 10  # names an error lists before it only counts
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` bytes into `file`, under the name `key`."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


def read_tensors(
    tensors: Mapping[str, StoredTensor], target: Callable[[str], torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the files, each in the dtype that `target` names for it.

    A tensor stored in that dtype is a copy-on-write view of the file and takes no memory of its own. Of the others one
    exists at a time, apart from those the caller keeps. Raises CheckpointError for values outside the target's range.
    """

    def position(item: tuple[str, StoredTensor]) -> tuple[str, int]:
        return str(item[1].file), item[1].offset

    for _, group in itertools.groupby(sorted(tensors.items(), key=position), key=lambda x: x[1].file):
        whole_file: mmap.mmap | None = None  # one map for all views: each map holds a file handle until it is gone
        for name, stored in group:
            if (dtype := target(name)) != stored.dtype:
                yield name, _converted(stored, dtype)
                continue
            if whole_file is None:
                whole_file = _map(stored.file, 0, stored.file.stat().st_size)
            yield name, _view(whole_file, stored, stored.offset)


def _map(file: Path, start: int, length: int) -> mmap.mmap:
    """Map a part of a file, writable without changing the file. `start` is a multiple of ALLOCATIONGRANULARITY."""
    with file.open("rb") as stream:
        if sys.platform == "linux":
            # Without NORESERVE Linux refuses maps larger than RAM and swap. Python 3.11 has no name for the flag.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            return mmap.mmap(stream.fileno(), length, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        return mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=start)


def _view(memory: mmap.mmap, stored: StoredTensor, start: int) -> Tensor:
    count = math.prod(stored.shape)
    if start % stored.dtype.itemsize:  # other writers do not align; a tensor must be
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=count * stored.dtype.itemsize, offset=start)
        return raw.clone().view(stored.dtype).reshape(stored.shape)
    return torch.frombuffer(memory, dtype=stored.dtype, count=count, offset=start).reshape(stored.shape)


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    # A map of this tensor alone, gone with it: pages of a map that stays would pile up as the file is read.
    start = stored.offset - stored.offset % mmap.ALLOCATIONGRANULARITY
    end = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    values = _view(_map(stored.file, start, end - start), stored, stored.offset - start)
    if dtype in (torch.float16, torch.float8_e4m3fn) and stored.dtype.itemsize > 1:
        limit = torch.finfo(dtype).max
        low, high = (x.item() for x in values.aminmax())
        if not (low >= -limit and high <= limit):  # true for NaN as well
            raise CheckpointError(
                f"{stored.file}: the values of {stored.key!r} go from {low:.4g} to {high:.4g}, which {dtype} cannot "
                f"hold (at most {limit:.4g}). Choose bf16."
            )
    return values.to(dtype)


def read_headers(files: list[Path]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by key and metadata of one file, or of the shards of one; CheckpointError unless all of it is there."""
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        tensors, notes = _read_header(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise CheckpointError(f"{file} and another shard hold {some(twice)} both. Download the folder again.")
        stored |= tensors
        metadata |= notes
    return stored, metadata


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, after checking that all of it is there."""
    if file.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, by its name, and opening one can run any code in it. Give a .safetensors file."
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(9)
        length = int.from_bytes(start[:8], "little")
        if not size:
            raise CheckpointError(f"{file} is empty (0 bytes). Download it again.")
        if start[8:] != b"{" or length > MAX_HEADER:
            raise CheckpointError(f"{file} is no safetensors file{_kind(start)}. Give a .safetensors file of Helios.")
        if 8 + length > size:
            raise CheckpointError(_truncated(file, size, 8 + length))
        text = start[8:] + stream.read(length - 1)
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        entries = [
            (key, str(entry["dtype"]), tuple(map(int, entry["shape"])), int(first), int(last))
            for key, entry in header.items()
            for first, last in [entry["data_offsets"]]
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The header of {file} is damaged ({error}). Download the file again.") from error

    end = 8 + length + max((entry[4] for entry in entries), default=0)
    if end > size:
        raise CheckpointError(_truncated(file, size, end))
    tensors: dict[str, StoredTensor] = {}
    for key, dtype, shape, first, last in entries:
        if dtype in DTYPES and not (first >= 0 and last - first == math.prod(shape) * DTYPES[dtype].itemsize):
            raise CheckpointError(
                f"The header of {file} is damaged ({key!r} of shape {shape} does not fill its {last - first} bytes). "
                "Download the file again."
            )
        # Other types are kept as uint8, for `_check` to name: the file may turn out to be of another model altogether.
        tensors[key] = StoredTensor(file, key, shape, DTYPES.get(dtype, torch.uint8), 8 + length + first)
    return tensors, metadata


def _kind(start: bytes) -> str:
    for magic, kind in (
        (b"PK", " but a pickle saved by torch"),
        (b"\x80", " but a pickle"),
        (b"GGUF", " but a GGUF file"),
        (b"version ", " but a git-lfs pointer; fetch the file itself with `git lfs pull`"),
        (b"<", " but a web page"),
    ):
        if start.startswith(magic):
            return kind
    return ""


def _truncated(file: Path, size: int, expected: int) -> str:
    return f"{file} is truncated: {size} bytes are there of at least {expected}. Download it again."


def some(names: Collection[object]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(str(name) for name in list(names)[:SHOWN])
    return shown + (f", and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
