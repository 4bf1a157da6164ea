"""Puts a ComfyUI tree on sys.path, in CPU mode: COMFYUI_PATH, or the one `make setup` unpacks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from harness.pack import load_comfyui

base = tempfile.TemporaryDirectory(prefix="helios-host-")  # removed when the tests' process ends
load_comfyui(base.name)


@pytest.fixture(autouse=True)
def forget_listed_folders() -> Iterator[None]:
    """The host cannot look at a list again whose folder is gone, and temporary folders go after each test."""
    import folder_paths

    yield
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def nothing_shipped(tmp_path, monkeypatch):
    """The lists hold what a test puts into the host's folders, and no Helios-Tiny behind it."""
    monkeypatch.setattr("comfyui_helios.host.files.shipped.MODELS", tmp_path / "nowhere")


@pytest.fixture
def shown(monkeypatch):
    """What nodes write onto themselves, as (text, node id)."""
    messages = []
    monkeypatch.setattr("comfyui_helios.host.messages._shown", set())  # nothing of other tests that they would clear
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: messages.append((text, node_id)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return messages
