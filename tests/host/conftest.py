"""Puts a ComfyUI tree on sys.path, in CPU mode: COMFYUI_PATH, or the one `make setup` unpacks."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

COMFYUI = Path(__file__).resolve().parents[2] / os.environ.get("COMFYUI_PATH", "build/comfyui")
if not (COMFYUI / "comfy").is_dir():
    raise FileNotFoundError(f"{COMFYUI} is no ComfyUI checkout. Run `make setup`, or set COMFYUI_PATH to one.")

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(COMFYUI))

from comfy.cli_args import args  # noqa: E402

base = tempfile.TemporaryDirectory(prefix="helios-host-")  # removed when the tests' process ends
# Read when the host's other modules are imported. On import the host takes no command line but its own main.py's.
args.cpu = True
args.use_pytorch_cross_attention = True
args.base_directory = base.name
args.database_url = "sqlite:///:memory:"


@pytest.fixture
def shown(monkeypatch):
    """What nodes write onto themselves, as (text, node id)."""
    messages = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: messages.append((text, node_id)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return messages
