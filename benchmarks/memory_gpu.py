"""Memory of a chunk of the 14B model on one GPU, offloaded and not: `make bench-memory-gpu`.

Random bf16 weights in one file, 384x640, steps [2, 2, 2], one prompt. Each case runs in a process of its own and
reports the peak of device memory that torch allocated, the peak of host memory (sampled RssAnon, pinned memory
included, minus its value after the imports) and seconds a chunk. Needs torch, safetensors, einops and accelerate.
`--tiny` runs the same on a small model, on the CPU if need be, to see that it runs. Rows go to
build/bench-memory-gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "build" / "bench-memory-gpu.json"
GB = 1e9
TINY: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 4, "ffn_dim": 704, "text_dim": 256}
CASES: dict[str, dict[str, Any]] = {
    "resident": {},
    "block_host": {"level": "block", "gather": True},
    "block_disk": {"level": "block", "gather": False},
    "leaf_host": {"level": "leaf", "gather": True},
    "leaf_disk": {"level": "leaf", "gather": False},
}
CHUNKS = 3  # the first warms up


def write_weights(file: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    from helios_core.checkpoint import CONFIG_KEY, target_dtypes
    from helios_core.config import TransformerConfig
    from helios_core.transformer import HeliosTransformer

    shape = TransformerConfig(**config)
    generator = torch.Generator().manual_seed(0)
    dtypes = target_dtypes(shape, torch.bfloat16)
    model = HeliosTransformer(shape, dtype=torch.bfloat16, device="meta")
    weights = {
        name: (torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5).to(dtypes[name])
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, file, {"format": "pt", CONFIG_KEY: json.dumps(shape.to_dict())})


def run_case(name: str, file: Path, tiny: bool) -> dict[str, Any]:
    import torch
    from measure import Peak

    from helios_core.checkpoint import open_checkpoint, target_dtypes
    from helios_core.config import NATIVE_HEIGHT, NATIVE_WIDTH, SPATIAL_SCALE
    from helios_core.generate import generate
    from helios_core.history import Memory
    from helios_core.offload import Offloader
    from helios_core.safetensors_file import read_tensors
    from helios_core.schedule import DISTILLED
    from helios_core.transformer import HeliosTransformer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = (8, 16) if tiny else (NATIVE_HEIGHT // SPATIAL_SCALE, NATIVE_WIDTH // SPATIAL_SCALE)
    schedule = replace(DISTILLED, steps=(2, 2, 2), amplify_first_chunk=False)
    with Peak() as host, torch.inference_mode():
        checkpoint = open_checkpoint(file)
        model = HeliosTransformer(checkpoint.config, dtype=torch.bfloat16, device="meta").eval()
        targets = target_dtypes(checkpoint.config, torch.bfloat16)
        model.load_state_dict(dict(read_tensors(checkpoint.tensors, targets.__getitem__)), assign=True)
        model.requires_grad_(False)
        settings = CASES[name]
        offloader = Offloader(model, device, **settings) if settings else None
        if offloader is None:
            model.to(device)
        text = torch.randn(1, 512, checkpoint.config.text_dim, dtype=torch.bfloat16, device=device)

        def bind(index: int, history: Any) -> Any:
            history = replace(
                history, **{part: getattr(history, part).to(torch.bfloat16) for part in ("long", "mid", "short")}
            )

            def predict(latents: torch.Tensor, timestep: float, sigma: float) -> torch.Tensor:
                flow = model(latents.to(torch.bfloat16), torch.tensor([timestep], device=device), text, history)
                return flow.to(latents.dtype)

            return predict

        memory = Memory.empty(1, height, width).to(device)
        times = []
        with offloader or nullcontext():
            start = time.perf_counter()
            for chunk in generate(bind, schedule, memory, CHUNKS, torch.Generator().manual_seed(0)):
                chunk.latents.sum().item()  # waits for the device
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"seconds": statistics.median(times[1:]), "host": host.bytes, "device": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="only this one, in this process")
    parser.add_argument("--weights", type=Path, help="the file of random weights; made if it is not there")
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU if need be")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.case:
        print(json.dumps(run_case(options.case, options.weights, options.tiny)))
        return
    import torch
    from measure import Row, write

    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no CUDA device; --tiny shows that the benchmark runs, and measures nothing of use.")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        file = options.weights or Path(temporary) / "weights.safetensors"
        if not file.exists():
            write_weights(file, TINY if options.tiny else {})
        for name in CASES:
            command = [sys.executable, __file__, "--case", name, "--weights", str(file)]
            command += ["--tiny"] if options.tiny else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            for figure, value, unit in (
                ("vram_14b", result["device"] and result["device"] / GB, "GB"),
                ("host_14b", result["host"] / GB, "GB"),
                ("seconds_a_chunk", result["seconds"], "s"),
            ):
                rows.append(Row(f"{figure}_{name}", value, None, unit))
            device = (result["device"] or 0) / GB
            print(f"{name:12} {device:7.2f} GB of VRAM {result['host'] / GB:7.2f} GB of RAM {result['seconds']:7.2f} s")
    write(RESULT, rows, tiny=options.tiny)


if __name__ == "__main__":
    main()
