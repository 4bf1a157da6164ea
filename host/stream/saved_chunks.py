"""Finished chunks on disk, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from ...helios_core.config import CHUNK_LATENTS
from ...helios_core.history import HistoryLayout, Memory, Statistics
from ...helios_core.json_file import parse_json
from ...helios_core.quoting import known_by_its_name, quoted
from ...helios_core.safetensors_file import KNOWN
from ..progress import check_interrupt
from ..sockets.prompt_changes import Change
from .plain_files import disk_errors, in_background, ordinary, written_whole
from .run_folder import claimed, remove_old, run_folder, tidy

CHUNK_FORMAT = "helios chunk 2"
MAX_HEADER = 1_000_000  # bytes of a chunk's file beside its tensors; they are a few hundred
WRONG = {
    "format": "it is no chunk of Helios, or of another version",
    "key": "it belongs to another graph",
    "chunk": "it is another chunk",
    "follows": "it follows on another chunk before it",
}


@known_by_its_name
class BadChunk(ValueError):
    """A file that is not the chunk it should be. Says which and why."""


@dataclass(frozen=True)
class SavedChunk:
    """A chunk as it was finished."""

    latents: Tensor  # (B, 16, 9, H, W), normalised
    memory: Memory  # with this chunk in it
    rng_state: Tensor  # uint8
    change: Change | None = None  # of the prompt, which took effect with this chunk
    finished: bool = False  # it is the last one because somebody has said so


@dataclass(frozen=True)
class Kind:
    """What the file of each chunk of a run must hold: it is checked against this before it is believed."""

    shape: tuple[int, ...]  # (B, 16, 9, H, W)
    layout: HistoryLayout  # of the memory
    watched: bool  # for drift: the memory holds statistics

    @classmethod
    def after(cls, memory: Memory, watched: bool) -> Kind:
        """The kind of the chunks of a run that begins with this memory."""
        batch, channels, _, height, width = memory.latents.shape
        return cls(
            (batch, channels, CHUNK_LATENTS, height, width),
            memory.layout,
            watched or memory.statistics is not None,
        )

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shape and possible dtypes of each tensor in a chunk's file."""
        batch, channels, _, height, width = self.shape
        kept = (torch.float32,)
        tensors: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "latents": (self.shape, (torch.float32, torch.bfloat16, torch.float16)),
            "memory": ((batch, channels, self.layout.frames, height, width), kept),
            "anchor": ((batch, channels, 1, height, width), kept),
            "rng_state": (tuple(torch.Generator().get_state().shape), (torch.uint8,)),
        }
        if self.watched:
            tensors["mean"] = tensors["var"] = ((batch, channels), kept)
        return tensors

    @property
    def max_bytes(self) -> int:
        return MAX_HEADER + sum(math.prod(shape) * dtypes[0].itemsize for shape, dtypes in self.tensors().values())


class SavedRun:
    """The chunks of one graph, a file each. Every file holds the digest of the one before: a chain has no gaps."""

    def __init__(self, folder: Path, kind: Kind):
        self.folder, self.key, self.kind = folder, folder.name, kind
        self.digests: list[str] = []
        self.changes: dict[int, Change] = {}  # of the prompt, in the chunks that were counted
        self.cleaned_up = False

    def path(self, index: int) -> Path:
        return self.folder / f"chunk_{index:05}.safetensors"

    def count(self, chunks: int) -> tuple[int, str | None]:
        """How many chunks in a row are there and whole, and what is wrong with the next one, if it is there.

        `chunks` at most, and none after one that somebody has made the last.
        """
        self.digests, self.changes = [], {}
        for index in range(chunks):
            check_interrupt()  # an hour of video is 18 GB to read
            if not os.path.lexists(self.path(index)):
                return index, None
            try:
                saved, digest = self._read(index)
            except BadChunk as error:
                return index, str(error)
            self.digests.append(digest)
            if saved.change:
                self.changes[index] = saved.change
            if saved.finished:
                return index + 1, None
        return chunks, None

    def load(self, index: int) -> SavedChunk:
        """A chunk that was counted. Raises BadChunk where the file has changed since."""
        saved, digest = self._read(index)
        if digest != self.digests[index]:
            raise BadChunk(f"{self.path(index)} was changed while it was in use.")
        return saved

    def save(self, index: int, chunk: SavedChunk) -> None:
        """Write a chunk whole or not at all; it follows those counted or saved. Raises OSError for a full disk."""
        del self.digests[index:]
        tensors = _to_tensors(chunk)
        metadata = {
            "format": CHUNK_FORMAT,
            "key": self.key,
            "chunk": str(index),
            "follows": self._follows(index),
            "memory": json.dumps({**_describe(chunk.memory.layout), "drifted": chunk.memory.drifted}),
        }
        if chunk.change or chunk.finished:
            change = chunk.change.as_dict() if chunk.change else None
            metadata["steering"] = json.dumps({"change": change, "finished": chunk.finished})
        metadata["digest"] = _digest(tensors, metadata)
        part = self.folder / f"{uuid.uuid4().hex}.part"
        with disk_errors(f"chunk {index + 1} of the video", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            with written_whole(self.path(index), part), open(part, "xb", opener=ordinary) as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(self.folder)
        self.digests.append(metadata["digest"])
        if not self.cleaned_up:
            self.cleaned_up = True  # once a run, and not by one that makes nothing
            in_background(remove_old, self.folder)

    def _follows(self, index: int) -> str:
        return self.digests[index - 1] if index else ""

    def _read(self, index: int) -> tuple[SavedChunk, str]:
        path = self.path(index)
        tensors, metadata = _read_file(path, self.kind)
        expected = {"format": CHUNK_FORMAT, "key": self.key, "chunk": str(index), "follows": self._follows(index)}
        wrong = next((name for name, value in expected.items() if metadata.get(name) != value), None)
        if wrong:
            raise BadChunk(f"{path} is not chunk {index + 1} of this video: {WRONG[wrong]}.")
        digest = metadata.pop("digest", "")
        if digest != _digest(tensors, metadata):
            raise BadChunk(f"{path} is damaged: its contents do not fit its checksum.")
        try:
            return _from_tensors(tensors, metadata, self.kind), digest
        except ValueError as error:
            raise BadChunk(f"{path} is no chunk of this video: {error}.") from error


@contextmanager
def open_run(key: str, kind: Kind, note: str) -> Iterator[SavedRun]:
    """The run with this key, for this process alone. note: what the folder says of itself.

    Raises ValueError where another process is making it, or where its folder cannot be.
    """
    folder = run_folder(key)
    with claimed(folder):
        tidy(folder, note)
        yield SavedRun(folder, kind)


def _read_file(path: Path, kind: Kind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a chunk's file. Raises BadChunk for what is none, before it takes any memory."""
    try:
        with open(path, "rb", opener=ordinary) as file:
            data = file.read(kind.max_bytes + 1)
        if len(data) > kind.max_bytes:
            raise BadChunk(f"{path} is larger than a chunk of this video.")
        stored = dict(deserialize(data))
    except OSError as error:
        raise BadChunk(f"{path} cannot be read: {error.strerror}.") from error
    except SafetensorError as error:
        raise BadChunk(f"{path} is damaged or no safetensors file ({error}).") from error
    expected = kind.tensors()
    if stored.keys() != expected.keys():
        raise BadChunk(f"{path} is no chunk of this video: it holds {quoted(sorted(stored))}.")
    tensors = {}
    for name, (shape, dtypes) in expected.items():
        found, dtype = tuple(stored[name]["shape"]), KNOWN.get(stored[name]["dtype"])
        if found != shape or dtype not in dtypes:
            raise BadChunk(f"{path} is no chunk of this video: {name} is {stored[name]['dtype']} {quoted(found)}.")
        tensors[name] = torch.frombuffer(bytearray(stored[name]["data"]), dtype=dtype).reshape(shape)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return tensors, json.loads(header).get("__metadata__", {})


def _to_tensors(chunk: SavedChunk) -> dict[str, Tensor]:
    memory = chunk.memory
    tensors = {"latents": chunk.latents, "memory": memory.latents, "rng_state": chunk.rng_state}
    if memory.anchor is not None:
        tensors["anchor"] = memory.anchor
    if memory.statistics is not None:
        tensors |= {"mean": memory.statistics.mean, "var": memory.statistics.var}
    # Copies: safetensors refuses tensors that share memory, as an anchor may with its chunk.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: Kind) -> SavedChunk:
    """Raises ValueError for values that no chunk has."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are no finite numbers")
    try:
        torch.Generator().set_state(tensors["rng_state"])
    except RuntimeError as error:
        raise ValueError("rng_state is no state of a random generator") from error
    values = parse_json(metadata.get("memory", "").encode())
    drifted = values.pop("drifted", None)
    if not isinstance(drifted, bool) or values != _describe(kind.layout):
        raise ValueError("its memory is laid out in another way")
    statistics = Statistics(tensors["mean"], tensors["var"]) if kind.watched else None
    memory = Memory(tensors["memory"], tensors["anchor"], kind.layout, statistics, drifted)
    change, finished = _steering(metadata.get("steering"))
    return SavedChunk(tensors["latents"], memory, tensors["rng_state"], change, finished)


def _steering(described: str | None) -> tuple[Change | None, bool]:
    """What `save` says of how the chunk was steered; most say nothing."""
    if described is None:
        return None, False
    values = parse_json(described.encode())
    if values.keys() != {"change", "finished"} or not isinstance(values["finished"], bool):
        raise ValueError("what it says of its prompt cannot be read")
    return None if values["change"] is None else Change.from_dict(values["change"]), values["finished"]


def _describe(layout: HistoryLayout) -> dict[str, Any]:
    return {"sizes": list(layout.sizes), "keep_first_frame": layout.keep_first_frame}


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a loss of power. Windows cannot, and does not need to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
