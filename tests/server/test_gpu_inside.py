"""A part of `make gpu` that runs in a ComfyUI, rehearsed on toy sizes."""

import json
import subprocess
import sys

from harness.host import ROOT


def test_an_offloaded_video_on_a_server_of_its_own(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--only", "comfyui_block"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    part = json.loads((tmp_path / "comfyui_block.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row["ours"] for row in part["rows"]}
    assert rows["host_14b_comfyui_block"] > 0
    assert rows["seconds_a_chunk_comfyui_block"] > 0
    assert part["about"]["comfyui"]
    assert "Group offloading of HeliosModel: 4 groups" in (tmp_path / "comfyui_block.log").read_text(encoding="utf-8")
