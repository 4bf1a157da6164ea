"""JSON files of any content: an object, or a sentence."""

import json
import os

import pytest

from comfyui_helios.helios_core.json_file import MAX_BYTES, MAX_DEPTH, read_json, read_json_if_there
from comfyui_helios.helios_core.regular_file import CheckpointError


def refusal(file):
    with pytest.raises(CheckpointError) as error:
        read_json(file)
    assert str(file) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no valid JSON"),
        (b"{", "is no valid JSON"),
        (b"[]", "it holds no object"),
        (b"null", "it holds no object"),
        (b"\xff\xfe{\x00}\x00", "is no valid JSON"),
        (b'{"eps": NaN}', "NaN is no number"),
        (b'{"eps": -Infinity}', "-Infinity is no number"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is no valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than"),
        (b"[" * 100_000, "nested more than"),
    ],
)
def test_what_is_no_object_of_json_is_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    assert message in refusal(file)


def test_depth_is_bounded_and_no_less_than_said(tmp_path):
    file = tmp_path / "config.json"
    value = 1
    for _ in range(MAX_DEPTH - 1):
        value = {"a": value}
    file.write_text(json.dumps(value))
    assert read_json(file) == value
    file.write_text(json.dumps({"a": value}))
    assert "nested more than" in refusal(file)


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(1_500_000_000)  # sparse: it takes no room
    assert "has 1500000000 bytes" in refusal(file)
    file.write_text('{"a": "' + " " * (MAX_BYTES - 9) + '"}')
    assert read_json(file).keys() == {"a"}


@pytest.mark.skipif(os.name != "posix", reason="makes pipes")
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    assert "is a pipe" in refusal(tmp_path / "pipe")
    assert "is a device" in refusal(tmp_path / "zero")
    assert "is a folder" in refusal(tmp_path / "folder")
    assert "cannot be read" in refusal(tmp_path / "circle")


def test_only_a_missing_file_may_be_missing(tmp_path):
    assert "config.json is missing" in refusal(tmp_path / "config.json")
    assert read_json_if_there(tmp_path / "config.json") == {}
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_json_if_there(tmp_path / "config.json")
