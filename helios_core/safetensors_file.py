"""safetensors files: their headers, and their tensors one at a time.

Parsed and mapped here instead of with `safetensors.safe_open`: its private mapping of a whole file counts against
memory on Linux, which refuses it for a file larger than RAM and swap together.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .json_file import MAX_BYTES, parse_json, read_json
from .quoting import quoted, some
from .regular_file import CheckpointError, FileFacts, open_regular

FORMAT_LIMIT = 100_000_000  # bytes that the format allows a header
MAX_RANK = 16
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Of quantised weights, and of what they have beside them. E8M0 is read as its bytes: torch before 2.7 has no such type.
PACKED = {"U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.uint8}
KNOWN = DTYPES | PACKED
UNREADABLE = torch.bool  # stands for all other types


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` bytes into a file, under the name `key`."""

    source: FileFacts  # the file as it was when its header was read
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def file(self) -> Path:
        return self.source.path


def read_tensors(
    tensors: Mapping[str, StoredTensor], target: Callable[[str], torch.dtype] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of the files, each in the dtype that `target` names for it, or as it is stored.

    A tensor stored in that dtype is a copy-on-write view of the file and takes no memory of its own. Of the others one
    exists at a time, apart from those the caller keeps. Raises CheckpointError for values outside the target's range,
    and for a file that has changed since its header was read.
    """

    def position(item: tuple[str, StoredTensor]) -> tuple[str, int]:
        return str(item[1].file), item[1].offset

    for source, group in itertools.groupby(sorted(tensors.items(), key=position), key=lambda x: x[1].source):
        whole_file: mmap.mmap | None = None  # one map for all views: each map holds a file handle until it is gone
        for name, stored in group:
            if target and (dtype := target(name)) != stored.dtype:
                yield name, _converted(stored, dtype)
                continue
            if whole_file is None:
                whole_file = _map(source, 0, source.size)
            yield name, _view(whole_file, stored, stored.offset)


def _map(source: FileFacts, start: int, length: int) -> mmap.mmap:
    """Map a part of a file, writable without changing the file. `start` is a multiple of ALLOCATIONGRANULARITY."""
    with open_regular(source.path) as (stream, facts):
        if facts != source:
            raise CheckpointError(f"{source.path} has changed while it was read. Load it again.")
        try:
            if sys.platform == "linux":
                # Without NORESERVE Linux refuses maps larger than RAM and swap. Python 3.11 has no name for the flag.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
                return mmap.mmap(stream.fileno(), length, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
            return mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        except OSError as error:
            advice = "Free some memory, or copy the file to a local disk: not every file system can do it."
            if sys.platform == "win32":
                advice = (
                    f"Windows counts its {length / 1e9:.1f} GB in full: make the paging file larger, or let Windows "
                    "choose its size."
                )
            raise CheckpointError(f"{source.path} cannot be mapped into memory ({error.strerror}). {advice}") from error


def _view(memory: mmap.mmap, stored: StoredTensor, start: int) -> Tensor:
    count = math.prod(stored.shape)
    if not count:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if start % stored.dtype.itemsize:  # other writers do not align; a tensor must be
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=count * stored.dtype.itemsize, offset=start)
        return raw.clone().view(stored.dtype).reshape(stored.shape)
    return torch.frombuffer(memory, dtype=stored.dtype, count=count, offset=start).reshape(stored.shape)


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    # A map of this tensor alone, gone with it: pages of a map that stays would pile up as the file is read.
    start = stored.offset - stored.offset % mmap.ALLOCATIONGRANULARITY
    end = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    values = _view(_map(stored.source, start, end - start), stored, stored.offset - start)
    if dtype in (torch.float16, torch.float8_e4m3fn) and stored.dtype.itemsize > 1:
        limit = torch.finfo(dtype).max
        low, high = (x.item() for x in values.aminmax())
        if not (low >= -limit and high <= limit):  # true for NaN as well
            raise CheckpointError(
                f"{stored.file}: the values of {quoted(stored.key)} go from {low:.4g} to {high:.4g}, which {dtype} "
                f"cannot hold (at most {limit:.4g}). Choose bf16."
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
    with open_regular(file) as (stream, source):
        start = stream.read(9)
        length = int.from_bytes(start[:8], "little")
        if not source.size:
            raise CheckpointError(f"{file} is empty (0 bytes). Download it again.")
        if start[8:] != b"{" or length > FORMAT_LIMIT:
            raise CheckpointError(
                f"{file} is no safetensors file{_kind(start)}. Give one of Helios, or download it again."
            )
        if (begin := 8 + length) > source.size:
            raise CheckpointError(_truncated(source, begin))
        if length > MAX_BYTES:
            raise CheckpointError(f"{file} has a header of {length} bytes, which no model of Helios has. Not read.")
        text = start[8:] + stream.read(length - 1)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not all text")
        entries = sorted(_entry(key, value) for key, value in header.items())
        end = begin + _covered(entries)
    except ValueError as error:
        raise CheckpointError(f"The header of {file} is damaged ({error}). Download the file again.") from error
    if end > source.size:
        raise CheckpointError(_truncated(source, end))
    if end < source.size:  # as where the header's length is not what it was: every weight would be another's bytes
        raise CheckpointError(
            f"The header of {file} is damaged (it ends {source.size - end} bytes before the file). "
            "Download the file again."
        )
    # Other types are left for the reader to name: the file may turn out to be of another model altogether.
    tensors = {
        key: StoredTensor(source, key, shape, KNOWN.get(dtype, UNREADABLE), begin + first)
        for first, _, key, dtype, shape in entries
    }
    return tensors, metadata


Entry = tuple[int, int, str, str, tuple[int, ...]]  # first byte, the one after the last, key, dtype, shape


def _entry(key: str, value: Any) -> Entry:
    """A tensor's line in a header. Raises ValueError unless it says what it must."""
    values = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (values.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"it says {quoted(value)} of {quoted(key)}")
    first, last = offsets
    if dtype in KNOWN and last - first != math.prod(shape) * KNOWN[dtype].itemsize:
        raise ValueError(f"{quoted(key)} of shape {tuple(shape)} does not fill its {last - first} bytes")
    return first, last, key, dtype, tuple(shape)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= MAX_RANK
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _covered(entries: list[Entry]) -> int:
    """How many bytes the tensors, in the order of their offsets, take. Raises ValueError for gaps and overlaps."""
    end = 0
    for first, last, key, _, _ in entries:
        if first != end or last < first:
            raise ValueError(f"{quoted(key)} lies at {first} to {last}, though the tensor before it ends at {end}")
        end = last
    return end


def read_index(index: Path) -> list[Path]:
    """The shards that an index beside them names, all of them there. Raises CheckpointError."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no 'weight_map' that names the shards. Download it again.")
    for name in where.values():
        # Lexical on purpose: a download cache links the shards to files elsewhere, an index must not point there.
        if not isinstance(name, str) or re.search(r"[/\\:\0]", name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {quoted(name)}, which is no .safetensors file in its own folder. It was not "
                "opened; download the index again."
            )
    shards = [index.parent / name for name in sorted(set(where.values()))]
    if missing := [shard.name for shard in shards if not os.path.exists(shard)]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {some(missing)}. Download them."
        )
    return shards


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


def _truncated(source: FileFacts, expected: int) -> str:
    return f"{source.path} is truncated: {source.size} bytes are there of at least {expected}. Download it again."
