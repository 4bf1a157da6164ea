"""The English words that other languages translate are those of the nodes."""

import pytest

from harness.small import ROOT
from write_locales import ENGLISH, as_json, words


@pytest.fixture(scope="module")
def said():
    return words()


def test_the_english_file_says_what_the_nodes_say(said):
    text = ENGLISH.read_text(encoding="utf-8")
    assert text == as_json(said), (
        "run `python scripts/write_locales.py`, then translate what tests/core/test_locales.py names"
    )


def test_every_input_has_a_tooltip(said):
    without = [
        f"{node}.{name}"
        for node, told in said.items()
        for name, words in told["inputs"].items()
        if "tooltip" not in words
    ]
    assert without == []


def test_every_node_has_a_help_page(said):
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(said)
