"""What Windows does otherwise, on files and programs without ComfyUI: open files, its console, the embedded Python."""

import errno
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from comfyui_helios.helios_core import regular_file, safetensors_file
from comfyui_helios.helios_core.regular_file import CheckpointError, put_in_place
from comfyui_helios.helios_core.safetensors_file import read_headers, read_tensors
from support.scripts import SCRIPTS
from support.windows_files import needs_proc, windows_files

PROGRAMS = ["convert_checkpoint", "convert_lora"]


@needs_proc
def test_a_new_file_that_is_looked_at_for_a_moment_gets_its_name(tmp_path, monkeypatch):
    part, target = tmp_path / "a.part", tmp_path / "a"
    part.write_bytes(b"new")
    target.write_bytes(b"old")
    scanner = part.open("rb")
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            scanner.close()

    monkeypatch.setattr(regular_file, "sleep", wait)
    with windows_files():
        put_in_place(part, target)
    assert (len(waited), target.read_bytes(), part.exists()) == (2, b"new", False)


@needs_proc
def test_a_file_that_stays_in_use_is_told_in_the_end(tmp_path, monkeypatch):
    part, target = tmp_path / "a.part", tmp_path / "a"
    part.write_bytes(b"new")
    target.write_bytes(b"old")
    waited = []
    monkeypatch.setattr(regular_file, "sleep", waited.append)
    with windows_files(), target.open("rb"), pytest.raises(PermissionError, match="used by another process"):
        put_in_place(part, target)
    assert 1 < sum(waited) < 10


def test_what_other_systems_refuse_is_not_waited_for(tmp_path, monkeypatch):
    def refuse(part, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as in a sticky folder, of another's file

    monkeypatch.setattr(regular_file.os, "replace", refuse)
    monkeypatch.setattr(regular_file, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(PermissionError, match="not permitted"):
        put_in_place(tmp_path / "a.part", tmp_path / "a")


@needs_proc
def test_a_model_that_is_in_use_is_not_converted_over(script, official, tmp_path, capsys, monkeypatch):
    target = tmp_path / "a.safetensors"
    assert script.main([str(official), str(target)]) == 0
    with windows_files():
        assert script.main([str(official), str(target), "--force"]) == 0  # nothing of its own is left open
        loaded = dict(read_tensors(read_headers([target])[0], lambda name: script.torch.float32))
        monkeypatch.setattr(script, "open_checkpoint", lambda path: pytest.fail("work began"))
        assert script.main([str(official), str(target), "--force"]) == 1
    assert loaded
    assert f"{target} cannot be overwritten (The file is used by another process)" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_where_python_does_not_look_beside_them(program, tmp_path):
    """As the Python of ComfyUI's portable build, whose ._pth file makes it so."""
    command = [sys.executable, "-P", str(SCRIPTS / f"{program}.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_what_was_made_is_told_into_a_file_in_a_windows_encoding(official, tmp_path):
    target = tmp_path / "модель \N{MOVIE CAMERA}.safetensors"
    command = [sys.executable, str(SCRIPTS / "convert_checkpoint.py"), str(official), str(target)]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert rb"\U0001f3a5.safetensors: 0.00 GB" in run.stdout
    assert read_headers([target])[0]


@pytest.mark.parametrize(
    ("platform", "advice"),
    [
        ("win32", "Windows counts its .* make the paging file larger"),
        ("linux", "Free some memory, or copy the file to"),
    ],
)
def test_a_file_that_the_system_does_not_map_is_told(official, monkeypatch, platform, advice):
    def refuse(*args, **kwargs):
        raise OSError(22, "No such device")

    monkeypatch.setattr(safetensors_file, "sys", SimpleNamespace(platform=platform))
    stored, _ = read_headers(sorted((official / "transformer").glob("*.safetensors"))[:1])
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=rf"cannot be mapped into memory \(No such device\)\. {advice}"):
        list(read_tensors(stored, lambda name: stored[name].dtype))
