"""What a stranger reads first is true: the files it names are there, and the picture is that of the imports."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("nodes", "host", "helios_core")
SUFFIXES = (".json", ".md", ".py", ".svg", ".toml", ".txt", ".yml")


def quoted(name: str) -> list[str]:
    """What stands between backticks in a document, code blocks left out."""
    words = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", words, flags=re.DOTALL))


def is_path(words: str) -> bool:
    return " " not in words and ("/" in words or words.endswith(SUFFIXES))


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "tests/README.md"])
def test_every_path_exists(name):
    paths = [words for words in quoted(name) if is_path(words)]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_name_in_the_architecture_is_one_of_the_code():
    code = "\n".join(file.read_text(encoding="utf-8") for floor in FLOORS for file in (ROOT / floor).rglob("*.py"))
    known = set(re.findall(r"\w+", code))
    names = [words for words in quoted("ARCHITECTURE.md") if re.fullmatch(r"\w+(\.\w+)*", words) and not is_path(words)]
    assert [name for name in names if not set(name.split(".")) <= known] == []


def test_the_picture_is_that_of_the_imports():
    draw = runpy.run_path(str(ROOT / "scripts" / "draw_architecture.py"))["draw"]
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert picture == draw(), "run `python scripts/draw_architecture.py` and look at docs/architecture.svg"


def test_the_first_workflow_lists_every_word_that_its_model_knows():
    world = runpy.run_path(str(ROOT / "training" / "world.py"))
    workflow = json.loads((ROOT / "workflows" / "helios_first_run.json").read_text(encoding="utf-8"))
    [note] = [node["widgets_values"][0] for node in workflow["nodes"] if node.get("title") == "Words it knows"]
    kinds = [world[name] for name in ("COLOURS", "SHAPES", "SIZES", "BACKGROUNDS")]
    known = set(" ".join([*(word for kind in kinds for word in kind), *world["MOTIONS"].values()]).split())
    assert known - set(re.findall(r"\w+", note)) == set()


def test_who_comes_from_elsewhere_is_led_to_inputs_that_exist():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = guide.partition("## Coming from elsewhere")[2]
    ours = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    words = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")).values()
    inputs = {name for told in words for name in told["inputs"]}
    assert len(ours) > 20
    named = {name for cell in ours for name in re.findall(r"`(\w+)`", cell)}
    assert named <= inputs
