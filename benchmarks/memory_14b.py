"""Host memory that the 14B's shape takes on this machine's processor, offloaded from disk:
`python benchmarks/memory_14b.py`.

For machines without a card, and with less memory than the weights have: those are zeros, in a file with a hole that
takes no room on disk. The video is of 128x64, so that it takes minutes. What a card would hold counts as well, pinned
memory does not exist. Seconds say nothing of a disk.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import memory_gpu
import torch
from measure import table

from helios_core.checkpoint import CONFIG_KEY, published_name, target_dtypes
from helios_core.config import TransformerConfig
from helios_core.transformer import HeliosTransformer

SIZE = (8, 16)  # in latents
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # of safetensors


def write_zeros(file: Path, config: TransformerConfig) -> None:
    dtypes = target_dtypes(config, torch.bfloat16)
    empty = HeliosTransformer(config, dtype=torch.bfloat16, device="meta").state_dict()
    header: dict[str, object] = {"__metadata__": {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}}
    end = 0
    for name, tensor in empty.items():
        begin, end = end, end + tensor.numel() * dtypes[name].itemsize
        entry = {"dtype": NAMES[dtypes[name]], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[published_name(name)] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "zeros.safetensors"
        write_zeros(file, TransformerConfig())
        for case, settings in memory_gpu.CASES.items():
            if settings and not settings["gather"]:
                print(table(list(memory_gpu.rows(case, file, tiny=False, size=SIZE))), flush=True)


if __name__ == "__main__":
    main()
