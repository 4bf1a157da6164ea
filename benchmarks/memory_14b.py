"""Host memory that the 14B's shape takes on this machine's processor, offloaded from disk:
`python benchmarks/memory_14b.py`.

For machines without a card, and with less memory than the weights have: those are zeros, in a file with a hole that
takes no room on disk. The video is of 128x64, so that it takes minutes. What a card would hold counts as well, pinned
memory does not exist. Seconds say nothing of a disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import memory_gpu
import torch
from convert_checkpoint import lay_out
from measure import table

from helios_core.config import TransformerConfig
from helios_core.transformer import HeliosTransformer

SIZE = (8, 16)  # in latents


def write_zeros(file: Path, config: TransformerConfig) -> None:
    empty = HeliosTransformer(config, dtype=torch.bfloat16, device="meta").state_dict()
    unread: Any = SimpleNamespace(config=config, tensors=empty)  # of a checkpoint what a file's plan needs
    layout = lay_out(unread, torch.bfloat16, None, None)
    with file.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "zeros.safetensors"
        write_zeros(file, TransformerConfig())
        for case, settings in memory_gpu.CASES.items():
            if settings and not settings["gather"]:
                print(table(list(memory_gpu.rows(case, file, tiny=False, size=SIZE))), flush=True)


if __name__ == "__main__":
    main()
