"""Write locales/en/nodeDefs.json: all words of our nodes, as the page asks for them in the reader's language.

To run after a node's words have changed. The file has what nodes/ says, and is what the other languages are compared
with; a test names what they lack. Needs a ComfyUI: COMFYUI_PATH, or the one that `make setup` unpacks.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

from harness.host import ROOT
from harness.pack import load_comfyui, load_pack

LOCALES = ROOT / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"


def words() -> dict[str, Any]:
    """{node: {display_name, description, inputs: {id: {name, tooltip}}, outputs: {index: {name, tooltip}}}}."""
    from comfyui_helios.nodes import HeliosExtension

    schemas = [node.define_schema() for node in asyncio.run(HeliosExtension().get_node_list())]
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: _told(entry.display_name or entry.id, entry.tooltip) for entry in schema.inputs},
            "outputs": {
                str(index): told
                for index, entry in enumerate(schema.outputs)
                if (told := _told(entry.display_name, entry.tooltip))
            },
        }
        for schema in schemas
    }


def _told(name: str | None, tooltip: str | None) -> dict[str, str]:
    return {key: value for key, value in (("name", name), ("tooltip", tooltip)) if value}


def as_json(translated: dict[str, Any]) -> str:
    return json.dumps(translated, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    load_pack()
    with tempfile.TemporaryDirectory() as base:
        load_comfyui(base)
        ENGLISH.write_text(as_json(words()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
