"""Finished chunks on disk, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...helios_core.history import HistoryLayout, Memory, Statistics
from .disk import disk_errors

log = logging.getLogger(__name__)

CHUNK_FORMAT = "helios chunk 1"
FOLDER = "helios_resume"  # below the host's output folder
KEPT_RUNS = 3
KEPT_SECONDS = 24 * 60 * 60
KEY = re.compile(r"[0-9a-f]{64}")
OUR_FILE = re.compile(r"chunk_\d{5}\.safetensors(\.part)?")
WRONG = {
    "format": "it is no chunk of Helios, or of another version",
    "key": "it belongs to another graph",
    "chunk": "it is another chunk",
    "follows": "it follows on another chunk before it",
}


class BadChunk(ValueError):
    """A file that is not the chunk it should be. Says which and why."""


@dataclass(frozen=True)
class SavedChunk:
    """A chunk as it was finished, on the CPU."""

    latents: Tensor  # (B, 16, 9, H, W), normalised
    memory: Memory  # with this chunk in it
    rng_state: Tensor  # uint8


class SavedRun:
    """The chunks of one graph, a file each. Every file holds the digest of the one before: a chain has no gaps."""

    def __init__(self, folder: Path):
        self.folder, self.key = folder, folder.name
        self.digests: list[str] = []

    def path(self, index: int) -> Path:
        return self.folder / f"chunk_{index:05}.safetensors"

    def count(self, chunks: int) -> tuple[int, str | None]:
        """How many chunks in a row are there and whole, and what is wrong with the next one, if it is there."""
        self.digests = []
        for index in range(chunks):
            if not self.path(index).exists():
                return index, None
            try:
                self.digests.append(self._read(index)[1])
            except BadChunk as error:
                return index, str(error)
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
            "memory": json.dumps(_describe(chunk.memory)),
        }
        metadata["digest"] = _digest(tensors, metadata)
        target = self.path(index)
        part = target.with_suffix(".safetensors.part")
        try:
            with disk_errors(f"chunk {index + 1} of the video", self.folder):
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                except (FileExistsError, NotADirectoryError) as error:
                    raise ValueError(
                        f"Chunks are saved in the folder {self.folder.parent}, but there is a file of that name. Move "
                        "it away, or switch resume off."
                    ) from error
                with part.open("wb") as file:
                    file.write(safetensors.torch.save(tensors, metadata))
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(target)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        _sync_folder(self.folder)
        self.digests.append(metadata["digest"])
        prune(self.folder)

    def _follows(self, index: int) -> str:
        return self.digests[index - 1] if index else ""

    def _read(self, index: int) -> tuple[SavedChunk, str]:
        path = self.path(index)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # off the mapped file
        except (SafetensorError, OSError) as error:
            raise BadChunk(f"{path} is damaged or no safetensors file ({error}).") from error
        expected = {"format": CHUNK_FORMAT, "key": self.key, "chunk": str(index), "follows": self._follows(index)}
        wrong = next((name for name, value in expected.items() if metadata.get(name) != value), None)
        if wrong:
            raise BadChunk(f"{path} is not chunk {index + 1} of this video: {WRONG[wrong]}.")
        digest = metadata.pop("digest", "")
        if digest != _digest(tensors, metadata):
            raise BadChunk(f"{path} is damaged: its contents do not fit its checksum.")
        return _from_tensors(tensors, json.loads(metadata["memory"])), digest


def open_run(key: str) -> tuple[SavedRun, int]:
    """The run with this key, whose folder comes with its first chunk, and how many other runs have saved chunks."""
    run = SavedRun(Path(folder_paths.get_output_directory()) / FOLDER / key)
    if run.folder.is_dir():
        os.utime(run.folder)  # in use again: it counts as new
    return run, sum(map(_has_chunks, _others(run.folder)))


def prune(used: Path) -> None:
    """Delete runs' folders but the KEPT_RUNS that were in use last, `used` among them, and any of the last day.

    One graph may have many nodes that save, and a run that was cut off waits for its user.
    """
    for folder in _others(used)[KEPT_RUNS - 1 :]:
        try:
            if time.time() - folder.stat().st_mtime < KEPT_SECONDS:
                continue
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        except OSError as error:  # another ComfyUI may be at it
            log.warning("Could not delete the saved chunks in %s: %s", folder, error)


def _others(used: Path) -> list[Path]:
    """Folders of other runs, the last used first, those without a chunk at the end."""
    folders = (folder for folder in _our_folders(used.parent) if folder != used)
    return sorted(folders, key=lambda folder: (_has_chunks(folder), folder.stat().st_mtime_ns), reverse=True)


def _has_chunks(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _our_folders(root: Path) -> Iterator[Path]:
    """Folders that are named by a key and hold nothing but chunks. Others are somebody else's."""
    for folder in root.iterdir() if root.is_dir() else ():
        if not KEY.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        if all(OUR_FILE.fullmatch(file.name) and file.is_file() for file in folder.iterdir()):
            yield folder


def _to_tensors(chunk: SavedChunk) -> dict[str, Tensor]:
    memory = chunk.memory
    tensors = {"latents": chunk.latents, "memory": memory.latents, "rng_state": chunk.rng_state}
    if memory.anchor is not None:
        tensors["anchor"] = memory.anchor
    if memory.statistics is not None:
        tensors |= {"mean": memory.statistics.mean, "var": memory.statistics.var}
    # Copies: safetensors refuses tensors that share memory, as an anchor may with its chunk.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor], memory: dict) -> SavedChunk:
    layout = HistoryLayout(tuple(memory["sizes"]), memory["keep_first_frame"], memory["chunk"])
    statistics = Statistics(tensors["mean"], tensors["var"]) if "mean" in tensors else None
    return SavedChunk(
        tensors["latents"],
        Memory(tensors["memory"], tensors.get("anchor"), layout, statistics, memory["drifted"]),
        tensors["rng_state"],
    )


def _describe(memory: Memory) -> dict:
    layout = memory.layout
    return {
        "sizes": layout.sizes,
        "keep_first_frame": layout.keep_first_frame,
        "chunk": layout.chunk,
        "drifted": memory.drifted,
    }


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
