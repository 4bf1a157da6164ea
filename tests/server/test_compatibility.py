"""docs/compatibility.md: what the script makes of a node, and that the page has all nodes of the host it names."""

from __future__ import annotations

import importlib.util
import re
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


def test_the_page_has_every_node_of_the_hosts_it_names(server: Host, info: dict[str, Any], script: Any) -> None:
    page = script.DOCUMENT.read_text(encoding="utf-8")
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if not re.search(rf"ComfyUI [^|]*\b{re.escape(version)} ", page):
        pytest.skip("the page is of other ComfyUIs")
    for title, names in script.candidates(info).items():
        table = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
        assert sorted(row[0].removeprefix("| ") for row in rows if row[1] in ("", version)) == names
    assert str(ROOT) not in page


def test_a_node_has_a_line_for_each_outcome(script: Any) -> None:
    changed, failed = ({variant: script.Outcome(word) for variant in script.VARIANTS} for word in ("changed", "failed"))
    assert script.rows("A", {"0.3": changed, "0.24": changed, "0.33": changed}) == ["| A |  | changed | changed |  |\n"]
    assert script.rows("A", {"0.3": changed, "0.24": failed, "0.33": changed}) == [
        "| A | 0.3, 0.33 | changed | changed |  |\n",
        "| A | 0.24 | failed | failed |  |\n",
    ]
    assert script.rows("A", {"0.3": None, "0.24": failed}) == ["| A | 0.24 | failed | failed |  |\n"]
