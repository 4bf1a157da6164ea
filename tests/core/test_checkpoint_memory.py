"""Memory of reading and converting: RssAnon of a process of its own, sampled from here every millisecond."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.transformer import HeliosTransformer

ROOT = Path(__file__).resolve().parents[2]
BIG = TransformerConfig(num_attention_heads=8, text_dim=64, ffn_dim=4096, num_layers=8)  # 0.6 GB in fp32
SLACK = 8_000_000  # bytes, for allocator, threads and progress bar; less than 1 MB was measured
READ = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helios_core.checkpoint import open_checkpoint
from helios_core.safetensors_file import read_tensors
checkpoint = open_checkpoint(Path(sys.argv[2]))
print("ready", flush=True), sys.stdin.readline()
weights = dict(read_tensors(checkpoint.tensors, lambda name: torch.bfloat16))
total = sum(int(x.view(torch.uint8).max()) for x in weights.values())  # touches every page
"""
CONVERT = """
import sys
sys.path.insert(0, sys.argv[1] + "/scripts")
import convert_checkpoint
from pathlib import Path
convert_checkpoint.open_checkpoint(Path(sys.argv[2]))  # the first model on meta makes torch import 80 MB more
print("ready", flush=True), sys.stdin.readline()
assert convert_checkpoint.main(sys.argv[2:]) == 0
"""


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random fp32 checkpoint, written tensor by tensor."""
    shapes = {name: x.shape for name, x in HeliosTransformer(BIG, device="meta").state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * shape.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("big") / "fp32.safetensors"
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            stream.write(rng.standard_normal(shape.numel(), dtype=np.float32).data)
    yield file
    for made in file.parent.iterdir():
        made.unlink()


def anonymous_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("RssAnon")), 0)


def peak_of(code: str, *args: object) -> int:
    """Anonymous bytes that the code takes at most, over what it has when it says "ready"."""
    command = [sys.executable, "-c", code, str(ROOT), *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        base = peak = anonymous_memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.001)
    assert process.returncode == 0
    return peak - base


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_reading_and_converting_hold_no_more_than_they_must(big_file):
    sizes = [x.numel() for x in HeliosTransformer(BIG, device="meta").state_dict().values()]
    weights, two_tensors = 2 * sum(sizes), 2 * 4 * max(sizes)
    half = big_file.with_name("bf16.safetensors")
    peaks = {
        "fp32 file to bf16 weights": (peak_of(READ, big_file), weights + two_tensors),
        "conversion": (peak_of(CONVERT, big_file, half), two_tensors),
        "bf16 file to bf16 weights": (peak_of(READ, half), two_tensors),
        "scaling to fp8": (peak_of(CONVERT, big_file, half, "--force", "--quant", "fp8_scaled"), two_tensors),
    }
    print({what: f"{peak / 1e6:.0f} MB, allowed {limit / 1e6:.0f} MB" for what, (peak, limit) in peaks.items()})
    assert {what: peak for what, (peak, limit) in peaks.items() if peak > limit + SLACK} == {}
    assert peaks["fp32 file to bf16 weights"][0] > 0.9 * weights  # or the measuring is at fault
