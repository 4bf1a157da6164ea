"""Our workflows at a size that two cores make in seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from harness.workflow import to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FIRST_RUN = "helios_first_run"  # on Helios-Tiny, and small as it is
ON_TINY = (FIRST_RUN, "helios_live")
LENGTHS = {"length_1": 1, "length_2": 1, "length_3": 1, "blend": 0}
SMALL = {"width": 128, "height": 64, "frames": 40, **LENGTHS}  # two chunks: 66 frames
FRAMES = {FIRST_RUN: 99, "helios_interactive": 99, "helios_extend": 132}  # where it is not 66


def read_workflow(name: str) -> dict[str, Any]:
    """The UI-format workflow workflows/`name`.json."""
    return dict(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))


def small_api(name: str, object_info: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """workflows/`name`.json in API format, at 128x64 and 40 frames, with these inputs set wherever a node has them.

    No tiny text encoder passes the host's own CLIPLoader, which builds UMT5-XXL: a folder's takes its place.
    """
    api = copy.deepcopy(to_api(read_workflow(name), object_info))
    for node in api.values():
        if node["class_type"] == "CLIPLoader":
            node["class_type"] = "HeliosDiffusersLoader"
            node["inputs"] = {"folder": "Helios-Distilled", "dtype": "auto"}
            clip = next(key for key, other in api.items() if other is node)
            for other in api.values():
                if other["inputs"].get("clip") == [clip, 0]:
                    other["inputs"]["clip"] = [clip, 1]
        for key, value in {**SMALL, **inputs}.items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):  # no link
                node["inputs"][key] = value
    return api


def find(api: dict[str, Any], kind: str) -> str:
    """Id of the one node of this class."""
    [found] = [key for key, node in api.items() if node["class_type"] == kind]
    return found


def last(api: dict[str, Any], kind: str) -> str:
    """Id of the last node of this class."""
    return [key for key, node in api.items() if node["class_type"] == kind][-1]


def with_latents(api: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The graph up to the sampler, whose latents are saved instead of decoded."""
    keep = ("Loader", "TextEncode", "Prompt", "History", "Schedule", "Sampler")
    api = {key: node for key, node in api.items() if any(word in node["class_type"] for word in keep)}
    api["save"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [last(api, "HeliosChunkedSampler"), 0], "filename_prefix": prefix},
    }
    return api
