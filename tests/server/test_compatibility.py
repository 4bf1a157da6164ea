"""docs/compatibility.md: what the script makes of a node, and that the page has all nodes of the host it names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.host import Host

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("try_nodes", ROOT / "scripts" / "try_nodes.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("RescaleCFG", "changed", ""),
        ("LatentFlip", "changed", ""),
        ("ModelMergeSimple", "unchanged", ""),
        ("KSampler", "refused", "A Helios model cannot be sampled with KSampler"),
        ("TomePatchModel", "refused", "TomePatchModel (nodes_tomesd) changes parts of a network"),
        ("FreeU", "failed", "'model_channels'"),
        ("ModelSave", "ran", ""),
        ("USOStyleReference", "not tried", "needs a MODEL_PATCH"),
    ],
)
def test_a_node_is_tried(server: Host, info: dict[str, Any], script: Any, name: str, word: str, said: str) -> None:
    outcome = script.Trial(server, info, "helios_t2v_base").outcome(name)
    assert outcome.word == word
    assert outcome.said.startswith(said) and bool(outcome.said) == bool(said)


def test_the_page_has_every_node_of_the_host_it_names(server: Host, info: dict[str, Any], script: Any) -> None:
    page = script.DOCUMENT.read_text(encoding="utf-8")
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if f"ComfyUI {version} " not in page:
        pytest.skip("the page is of another ComfyUI")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert sorted(row for row in rows if row != "node") == script.candidates(info)
    assert str(ROOT) not in page
