"""All words that people see are there in each language: nodes, what our JavaScript says, and whole help pages."""

import json
import re
from collections.abc import Iterator

import pytest

from harness.small import ROOT

FILES = ("main.json", "nodeDefs.json")
OTHERS = sorted(path.name for path in (ROOT / "locales").iterdir() if path.name != "en")
SCRIPTS = sorted((ROOT / "web").glob("*.js"))
HELP = ROOT / "web" / "docs"
NODES = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
NOT_ASCII = re.compile(r"[^\x00-\x7f–—…×·]")


def flat(words, prefix="") -> Iterator[tuple[str, str]]:
    """(address, words) of everything that is said in a file."""
    for key, value in words.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(language, file):
    return dict(flat(json.loads((ROOT / "locales" / language / file).read_text(encoding="utf-8"))))


def test_there_is_chinese():
    assert "zh" in OTHERS


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", OTHERS)
def test_a_language_says_all_that_english_says(language, file):
    english, theirs = read("en", file), read(language, file)
    missing = [f"{key}: {words}" for key, words in english.items() if not theirs.get(key)]
    assert missing == [], f"to be translated in locales/{language}/{file}"
    assert [key for key in theirs if key not in english] == [], f"nothing of ours, in locales/{language}/{file}"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("language", OTHERS)
def test_numbers_and_places_for_them_are_those_of_the_english_words(language, file):
    """A default or a limit that has changed is forgotten in the translation first."""
    theirs = read(language, file)
    marks = re.compile(r"\{\w+\}|\d+(?:\.\d+)?")
    for key, words in read("en", file).items():
        assert sorted(marks.findall(theirs.get(key, words))) == sorted(marks.findall(words)), f"{key}: {words}"


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_no_words_of_a_node_are_read_as_a_formula(language):
    """The page's i18n gives |, @ and braces meanings of their own."""
    assert [key for key, words in read(language, "nodeDefs.json").items() if re.search(r"[|@{}]", words)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_what_javascript_says_is_in_the_locales(script):
    text = script.read_text(encoding="utf-8")
    said = re.findall(r"\bwords\(\)\.(\w+)", text) + re.findall(r'\bfilled\([^"]*"(\w+)"', text)
    english = read("en", "main.json")
    assert [key for key in said if f"helios.{key}" not in english] == [], "add them to locales/*/main.json"
    assert NOT_ASCII.findall(text) == [], 'put these words into locales/*/main.json, under "helios": words().key'


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("language", OTHERS)
def test_a_help_page_is_there_in_each_language(node, language):
    english = (HELP / f"{node}.md").read_text(encoding="utf-8")
    theirs = (HELP / node / f"{language}.md").read_text(encoding="utf-8")
    assert theirs.startswith(f"# {read(language, 'nodeDefs.json')[f'{node}.display_name']}\n")
    headings = re.compile(r"^#+ ", re.MULTILINE)
    assert headings.findall(theirs) == headings.findall(english)
    files = re.compile(r"!\[[^\]]*\]\(([^)]+)\)|`((?:scripts|output|models)/[^`]+)`")
    assert files.findall(theirs) == files.findall(english)


@pytest.mark.parametrize("node", NODES)
def test_a_help_page_has_a_picture_all_inputs_and_three_mistakes(node):
    text = (HELP / f"{node}.md").read_text(encoding="utf-8")
    title, _, picture, *_ = text.splitlines()
    assert title == f"# {NODES[node]['display_name']}"
    assert re.fullmatch(rf"!\[.+\]\(pictures/{node}\.webp\)", picture)
    assert 2_000 < (HELP / "pictures" / f"{node}.webp").stat().st_size < 60_000
    inputs = {re.sub(r"[2-9]$", "1", name) for name in NODES[node]["inputs"]}  # "prompt_1 to prompt_4"
    assert {name for name in inputs if not re.search(rf"\b{name}\b", text)} == set()
    mistakes = text.partition("## Usual mistakes")[2].strip().splitlines()
    assert len(mistakes) == 3
    assert [line for line in mistakes if not re.match(r"- \*\*.+\*\*", line)] == []
