"""What makes the latents of a graph: one key for everything upstream of a node, the files it names included."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
from comfy_execution.graph_utils import is_link

from . import official

KEY_FORMAT = "helios graph 2"  # raised when the same graph gives other latents than before
# Inputs that change the video file, or how it is made, but no latents.
OFFLOAD = {"group_offload", "blocks_per_group", "weights_in"}
NOT_LATENTS = {
    "HeliosModelLoader": OFFLOAD,
    "HeliosDiffusersLoader": OFFLOAD,
    "HeliosTextEncode": OFFLOAD,
    "HeliosPromptSchedule": OFFLOAD,
    "HeliosStreamVideo": OFFLOAD
    | {"vae", "fps", "crf", "bit_depth", "trim", "drop_first", "resume", "overlap_decode", "vae_offload"},
}
UNUSED_FOLDERS = ("transformer_ode",)  # of an official repository

Prompt = dict[str, dict[str, Any]]  # the host's API format: node id -> class_type, inputs


def graph_key(prompt: Prompt, node_id: str) -> str:
    """64 hexadecimal digits, the same wherever the nodes upstream of node_id, their inputs and files are the same.

    Node ids, titles and positions do not count. Raises KeyError for a node that is not in the prompt, as when a node
    expands into others.
    """
    files = FileFacts()
    known: dict[str, str] = {}

    def digest(node: str) -> str:
        if node not in known:
            kind, inputs = prompt[node]["class_type"], prompt[node]["inputs"]
            kept = {name: inputs[name] for name in inputs if name not in NOT_LATENTS.get(kind, ())}
            values = {name: resolve(value) for name, value in kept.items()}
            named = [[text, files.of(text)] for text in sorted(set(_texts(list(kept.values()))))]
            known[node] = _sha256([KEY_FORMAT, kind, values, named])
        return known[node]

    def resolve(value: Any) -> Any:
        return {"from": digest(value[0]), "output": value[1]} if is_link(value) else {"value": value}

    return digest(node_id)


class FileFacts:
    """Size and time of every file that a text may name: in the input folder, a model folder, or an official folder."""

    def __init__(self) -> None:
        self.official = set(official.list_folders())

    def of(self, text: str) -> list[Any]:
        """[folder, name, size, mtime in ns] of each file; empty for a text that names none."""
        if not text or "\0" in text:
            return []
        found = []
        annotated = Path(folder_paths.get_annotated_filepath(text))
        if os.path.isfile(annotated):  # unlike Path.is_file, never raises, however long the text
            found.append(["input", *_facts(annotated, text)])
        for kind in sorted(folder_paths.folder_names_and_paths):
            with contextlib.suppress(ValueError):  # on Windows, of a text that begins like another drive's path
                if path := folder_paths.get_full_path(kind, text):
                    found.append([kind, *_facts(Path(path), text)])
        if text in self.official:
            folder = official.find_folder(text)
            for path in sorted(_used_files(folder)):
                found.append(["diffusers", *_facts(path, path.relative_to(folder).as_posix())])
        return found


def _used_files(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if name not in UNUSED_FOLDERS and not name.startswith(".")]
        paths = (Path(parent) / file for file in files if not file.startswith("."))
        yield from (path for path in paths if path.exists())  # a download that was cut off leaves links to nothing


def _facts(path: Path, name: str) -> tuple[str, int, int]:
    status = path.stat()
    return name, status.st_size, status.st_mtime_ns


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of an input; links are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list) and not is_link(value):
        for part in value:
            yield from _texts(part)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
