"""The key by which `resume` finds the chunks of a graph again: of the nodes upstream, their inputs and the named files.

A file may be replaced after it was loaded and before the key is made. The key is true of what was loaded all the same:
the host notes a fingerprint of each loader's files as the graph starts, and loads those anew that have another one than
before; `graph_key` refuses files that have changed since then; the guider refuses a MODEL whose files have changed
since they were opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
from comfy_execution.graph_utils import is_link

from ...helios_core.quoting import quoted
from ...helios_core.regular_file import FileFacts, facts_of
from ..files import official
from ..files.single_file import full_path

KEY_FORMAT = "helios graph 3"  # raised when the same graph gives other latents than before
# Inputs that change the video file, or how it is made, but no latents.
OFFLOAD = {"group_offload", "blocks_per_group", "weights_in"}
NOT_LATENTS = {
    "HeliosModelLoader": OFFLOAD,
    "HeliosDiffusersLoader": OFFLOAD,
    "HeliosTextEncode": OFFLOAD,
    "HeliosPromptSchedule": OFFLOAD,
    "HeliosMultiGPU": {"timeout"},
    "HeliosStreamVideo": OFFLOAD
    | {"vae", "fps", "crf", "bit_depth", "trim", "drop_first", "resume", "overlap_decode", "vae_offload", "live"}
    | {"clip", "until_finished"},
}
LOADERS = {  # and the input that names files
    "HeliosModelLoader": "model_name",
    "HeliosDiffusersLoader": "folder",
    "HeliosLoraLoader": "lora_name",
}

Prompt = dict[str, dict[str, Any]]  # the host's API format: node id -> class_type, inputs


def graph_key(prompt: Prompt, node_id: str) -> str:
    """64 hexadecimal digits, the same wherever the nodes upstream of node_id, their inputs and files are the same.

    Node ids, titles and positions do not count. Raises KeyError for a node that is not in the prompt, as when a node
    expands into others, and ValueError where files of a loader have changed since the graph was started.
    """
    files = NamedFiles()
    known: dict[str, str] = {}

    def digest(node: str) -> str:
        if node not in known:
            kind, inputs = prompt[node]["class_type"], prompt[node]["inputs"]
            kept = {name: inputs[name] for name in inputs if name not in NOT_LATENTS.get(kind, ())}
            values = {name: resolve(value) for name, value in kept.items()}
            named = [[text, files.lasting(text)] for text in sorted(set(_texts(kept)))]
            _check_as_started(prompt[node], files)
            known[node] = _sha256([KEY_FORMAT, kind, values, named])
        return known[node]

    def resolve(value: Any) -> Any:
        return {"from": digest(value[0]), "output": value[1]} if is_link(value) else {"value": value}

    return digest(node_id)


def fingerprint(name: Any) -> str:
    """Changes with the files that a loader's input names; the host loads anew where it has."""
    return NamedFiles().fingerprint(name)


class NamedFiles:
    """Every file that a text may name: in the input folder, a model folder, or an official folder."""

    def __init__(self) -> None:
        self.official = official.find_folders()

    def of(self, text: str) -> Iterator[tuple[str, str, FileFacts]]:
        """(kind of folder, name, facts) of each file; none for a text that names none."""
        if folder := self.official.get(text):
            for name, path in official.used_files(folder).items():
                if facts := facts_of(path):  # a download that was cut off leaves links to nothing
                    yield "diffusers", name, facts
            return
        if not text or "\0" in text:
            return
        name, folder = folder_paths.annotated_filepath(text)
        # Newer hosts (0.33) join the two only within the folder, and some nodes read a file from anywhere.
        if facts := facts_of(Path(folder or folder_paths.get_input_directory(), name)):
            yield "input", text, facts
        for kind in sorted(folder_paths.folder_names_and_paths):
            if (found := full_path(kind, text)) and (facts := facts_of(Path(found))):
                yield kind, text, facts

    def lasting(self, text: str) -> list[Any]:
        """The files' facts for a key, without inodes: on some file systems their numbers change with a restart."""
        return [[kind, name, facts.size, facts.mtime_ns] for kind, name, facts in self.of(text)]

    def fingerprint(self, text: Any) -> str:
        """Everything about the files that `check_unchanged` goes by."""
        files = self.of(text) if isinstance(text, str) else ()
        return _sha256([[kind, name, facts.size, facts.mtime_ns, facts.inode] for kind, name, facts in files])


def _check_as_started(node: dict[str, Any], files: NamedFiles) -> None:
    """Raise ValueError where a loader's files have another fingerprint than the host noted as the graph started."""
    name = node["inputs"].get(LOADERS.get(node["class_type"]))
    if name is not None and "is_changed" in node and node["is_changed"] != [files.fingerprint(name)]:
        raise ValueError(
            f"The files of {quoted(name)} have changed since this graph was started. Run it again: they are then "
            "loaded anew, and chunks of old and new files stay apart."
        )


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
