"""What a safetensors file says of its tensors is checked before a byte of them is read."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from comfyui_helios.helios_core.json_file import MAX_BYTES
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.safetensors_file import read_headers, read_tensors

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
}


def write(file: Path, header: object, data: bytes = bytes(40), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_headers([file])
    return str(error.value)


def changed(name: str, **values: object) -> dict:
    return {**TWO, name: {**TWO[name], **values}}


MALFORMED = {
    "overlap": changed("b", data_offsets=[20, 36]),
    "gap": changed("b", data_offsets=[28, 44]),
    "both at the same place": {**TWO, "b": TWO["a"]},
    "not from the beginning": {"a": {"dtype": "F32", "shape": [9], "data_offsets": [4, 40]}},
    "backwards": changed("b", shape=[-4]),
    "end before start": changed("b", data_offsets=[40, 24]),
    "fewer bytes than its shape": changed("b", shape=[5]),
    "an offset that is true": changed("a", data_offsets=[False, 24]),
    "an offset with a fraction": changed("a", data_offsets=[0.0, 24]),
    "three offsets": changed("a", data_offsets=[0, 24, 24]),
    "a shape in words": changed("a", shape="2, 3"),
    "a shape of true": changed("b", shape=[True, 4]),
    "a dtype that is a list": changed("a", dtype=["F32"]),
    "no offsets": {**TWO, "b": {"dtype": "F32", "shape": [4]}},
    "a tensor that is a number": {**TWO, "b": 5},
    "metadata that is no text": {"__metadata__": {"format": 1}, **TWO},
    "metadata that is a list": {"__metadata__": ["pt"], **TWO},
}


def test_a_whole_file_is_read(tmp_path):
    data = torch.arange(10, dtype=torch.float32)
    file = write(tmp_path / "a.safetensors", TWO, data.numpy().tobytes())
    stored, _ = read_headers([file])
    tensors = dict(read_tensors(stored, lambda name: torch.float32))
    assert torch.equal(tensors["a"], data[:6].view(2, 3))
    assert torch.equal(tensors["b"], data[6:])


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED)
def test_a_header_that_does_not_describe_its_file_is_refused_as_by_the_format(tmp_path, header):
    file = write(tmp_path / "a.safetensors", header)
    assert "The header of" in refusal(file)
    assert "is damaged" in refusal(file)
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass


def test_infinity_in_an_offset_is_refused(tmp_path):
    file = write(tmp_path / "a.safetensors", json.dumps(TWO).replace("40", "Infinity").encode())
    assert "Infinity is no number" in refusal(file)
    file = write(tmp_path / "a.safetensors", json.dumps(TWO).replace("40", "1e999").encode())
    assert "is damaged" in refusal(file)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_length_one_byte_off_does_not_shift_the_weights(tmp_path, off):
    """A header padded with spaces is whole JSON at any length, and every tensor would begin at its neighbour's byte."""
    text = json.dumps(TWO).encode() + b"   "
    file = write(tmp_path / "a.safetensors", text, b" " * 40, length=len(text) + off)
    assert "is damaged" in refusal(file) if off < 0 else "is truncated" in refusal(file)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    assert "it ends 3 bytes before the file" in refusal(write(tmp_path / "a.safetensors", TWO, bytes(43)))


def test_a_shape_of_very_many_axes_is_refused_before_it_is_multiplied(tmp_path):
    header = changed("b", shape=[2**62] * 100_000)
    assert "is damaged" in refusal(write(tmp_path / "a.safetensors", header))


def test_a_header_far_larger_than_any_models_is_not_parsed(tmp_path):
    text = b'{"' + b"a" * MAX_BYTES + b'": {}}'
    assert f"has a header of {len(text)} bytes" in refusal(write(tmp_path / "a.safetensors", text))


def test_a_header_nested_too_deep_is_refused(tmp_path):
    text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    assert "nested more than" in refusal(write(tmp_path / "a.safetensors", text))


def test_a_tensor_of_no_elements_is_read(tmp_path):
    save_file({"none": torch.zeros(0, 3), "some": torch.ones(3)}, tmp_path / "a.safetensors")
    stored, _ = read_headers([tmp_path / "a.safetensors"])
    assert dict(read_tensors(stored, lambda name: torch.float32))["none"].shape == (0, 3)


@pytest.mark.parametrize("change", ["truncated", "written to", "replaced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_that_changes_between_its_header_and_its_tensors_is_refused(tmp_path, change, dtype):
    file = write(tmp_path / "a.safetensors", TWO)
    stored, _ = read_headers([file])
    status = file.stat()
    if change == "truncated":
        os.truncate(file, status.st_size - 30)
    elif change == "written to":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        other = write(tmp_path / "other", TWO)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        dict(read_tensors(stored, lambda name: dtype))


def test_names_of_tensors_reach_a_message_escaped_and_cut(tmp_path):
    for name in ("\ud800", "\x1b[31m", "x" * 100_000):
        message = refusal(write(tmp_path / "a.safetensors", {name: 5}))
        assert message.encode().isascii()
        assert message.isprintable()
        assert len(message) < 500
