"""The key by which `resume` finds the chunks of a graph again: of the nodes upstream, their inputs and the named files.

A file may be replaced after it was loaded and before the key is made. The key is true of what was loaded all the same:
the host notes a fingerprint of each loader's files as the graph starts, and loads those anew that have another one than
before; `graph_key` refuses files that have changed since then; the guider refuses a MODEL whose files have changed
since they were opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy_execution.graph_utils import is_link

from ...helios_core.quoting import quoted
from ..files.named_files import NamedFiles, sha256

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
            given = [value for value in kept.values() if not is_link(value)]
            named = [[text, files.lasting(text)] for text in sorted(set(_texts(given)))]
            _check_as_started(prompt[node], files)
            known[node] = sha256([KEY_FORMAT, kind, values, named])
        return known[node]

    def resolve(value: Any) -> Any:
        return {"from": digest(value[0]), "output": value[1]} if is_link(value) else {"value": value}

    return digest(node_id)


def _check_as_started(node: dict[str, Any], files: NamedFiles) -> None:
    """Raise ValueError where a loader's files have another fingerprint than the host noted as the graph started."""
    name = node["inputs"].get(LOADERS.get(node["class_type"]))
    if name is not None and "is_changed" in node and node["is_changed"] != [files.fingerprint(name)]:
        raise ValueError(
            f"The files of {quoted(name)} have changed since this graph was started. Run it again: they are then "
            "loaded anew, and chunks of old and new files stay apart."
        )


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value. A list of a text and a number is a link only as all of an input, not within one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
