"""Whatever a file, a name or a person says can be printed, encoded and read, and does not fill the screen."""

import json
from pathlib import Path

import pytest

from comfyui_helios.helios_core.quoting import LONGEST, printable, quoted

HOSTILE = {
    "an escape code": ("\x1b[31mred\x1b[0m", r"'\x1b[31mred\x1b[0m'"),
    "a lone surrogate": ("a\ud800b", r"'a\ud800b'"),
    "undecodable bytes of a file name": (b"caf\xe9".decode("utf-8", "surrogateescape"), r"'caf\udce9'"),
    "control characters": ("a\0b\rc\x7fd\x9be", r"'a\x00b\rc\x7fd\x9be'"),
    "a new line": ("one\ntwo\u2028three", r"'one\ntwo\u2028three'"),
    "text that runs backwards": ("\u202egnp.exe", r"'\u202egnp.exe'"),
}
READABLE = [
    "Ein Café am Fluß",
    "一只狐狸　在雪地里",
    "Бегущая лиса",
    "🧑\u200d🚀 ☀️",
    "می\u200cخواهم",
    r"C:\models\a",
    "a\xa0b",
    "",
]


@pytest.mark.parametrize("text, shown", HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_printed_is_escaped(text, shown):
    assert quoted(text) == shown


@pytest.mark.parametrize("text", READABLE)
def test_what_people_write_stays_as_it_is(text):
    assert quoted(text) == f"'{text}'"
    assert printable(text) == text


def test_an_apostrophe_does_not_end_the_quotation():
    assert quoted("the fox's tail") == '"the fox\'s tail"'


@pytest.mark.parametrize("text", ["x" * 10**7, "\x1b" * 10**7, "\U0010ffff" * 10**7], ids=["x", "escape", "private"])
def test_length_is_bounded(text):
    shown = quoted(text)
    assert shown.endswith("...'")
    assert len(shown) <= 80 + len("...''")
    assert len(printable(text)) <= LONGEST + len("...")


def test_a_path_is_quoted_like_its_name():
    assert quoted(Path("models") / "a\x1bb") == quoted(str(Path("models") / "a\x1bb"))


def test_other_values_are_shown_as_python_writes_them():
    assert quoted(None) == "None"
    assert quoted([1, "a\ud800", 0.5]) == r"[1, 'a\ud800', 0.5]"


def test_values_of_any_depth_and_size_are_shown():
    deep = json.loads("[" * 500 + "]" * 500)
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep).startswith("[[[[[[")
    assert len(quoted(list(range(10**6)))) < 100
    assert len(quoted({"name" * 1000: "value" * 1000})) < 100


def test_a_message_keeps_its_lines():
    assert printable("one\ntwo\ttab\ud800") == "one\ntwo\\ttab\\ud800"


def test_a_message_is_made_of_any_error():
    assert printable(ValueError("\ud800")) == r"\ud800"
