"""What each format of the weights costs, and what it saves: `make bench-quant`.

Files as scripts/convert_checkpoint.py makes them, of one set of loud random weights, run by the core, with layers of
comfy-kitchen's where a format is only computed there. Errors are root mean squares against float32, as fractions of its
values: of one forward, and of the latents of two [2, 2, 2] chunks, by which what a forward rounds has been denoised on.
The table goes to build/quantised.md, with its rows in build/quantised.json. Whether a video still shows what it was
asked for: `benchmarks/meaning.py --transformer`; what a card makes of it is a part of `make gpu`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import torch
import torch.nn.functional as F
from convert_checkpoint import Quantising, convert
from measure import ROOT, in_turns, machine
from quantisers import ByKitchen
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.errors import mean_error
from harness.tiny import make_loud
from helios_core.checkpoint import open_checkpoint, published_name
from helios_core.config import TransformerConfig
from helios_core.generate import Run, generate
from helios_core.history import Memory
from helios_core.loading import load_transformer, replace_layers
from helios_core.predict import bind_transformer
from helios_core.scaled_linear import LARGEST, ScaledLinear
from helios_core.schedule import DISTILLED
from helios_core.transformer import HeliosTransformer

RESULT, TABLE = ROOT / "build" / "quantised.json", ROOT / "build" / "quantised.md"
CONFIG = TransformerConfig(num_attention_heads=4, text_dim=512, ffn_dim=1408, num_layers=12)  # 50 million parameters
LATENTS, TEXT_LENGTH = (16, 16), 64
SCHEDULE = replace(DISTILLED, steps=(2, 2, 2), amplify_first_chunk=False)


@dataclass(frozen=True)
class Format:
    """A kind of file, and how it is computed with."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    quantising: Quantising | None = None
    rounds_inputs: bool = False  # as hosts do that multiply in the format

    @property
    def timed(self) -> bool:
        """Whether the core computes with it as it is, and not with what stands for it."""
        return self.dtype != torch.float8_e4m3fn and not self.rounds_inputs and self.kitchen is None

    @property
    def kitchen(self) -> ByKitchen | None:
        quantiser = self.quantising and self.quantising.quantiser
        return quantiser if isinstance(quantiser, ByKitchen) else None


FP32, BF16 = Format("fp32", torch.float32), Format("bf16")
FORMATS = (
    FP32,
    BF16,
    Format("fp8_e4m3fn, no scales", torch.float8_e4m3fn),
    Format("fp8_scaled", quantising=Quantising()),
    Format("fp8_scaled, all blocks", quantising=Quantising(keep=())),
    Format("fp8_scaled, all blocks, multiplied in fp8", quantising=Quantising(keep=()), rounds_inputs=True),
    Format("int8", quantising=Quantising("int8")),
    Format("int8, all blocks", quantising=Quantising("int8", keep=())),
    Format("w4a8", quantising=Quantising("w4a8")),
    Format("w4a8, all blocks", quantising=Quantising("w4a8", keep=())),
    Format("nvfp4", quantising=Quantising("nvfp4")),
    Format("nvfp4, all blocks", quantising=Quantising("nvfp4", keep=())),
    Format("nvfp4, all blocks, multiplied in nvfp4", quantising=Quantising("nvfp4", keep=()), rounds_inputs=True),
)


class KitchenLinear(nn.Module):
    """A Linear with a weight of comfy-kitchen's, as hosts multiply with it: in int8 for int8 and w4a8, else decoded."""

    def __init__(self, weight: Any, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def write_weights(file: Path) -> Path:
    network = make_loud(HeliosTransformer(CONFIG), seed=0)
    save_file({published_name(name): x for name, x in network.state_dict().items()}, file)
    return file


def made(kind: Format, source: Path, folder: Path) -> Path:
    """The file of a format."""
    if kind == FP32:
        return source
    target = folder / f"{kind.name}.safetensors"
    with redirect_stderr(StringIO()):  # the bar
        convert(source, target, kind.dtype, kind.quantising)
    return target


def loaded(kind: Format, file: Path, exact: HeliosTransformer) -> HeliosTransformer:
    """What computes with a file, whose weights are those of `exact`. fp8 without scales is decoded once; hosts do it at
    every step."""
    kitchen = kind.kitchen
    network = load_transformer(file, torch.bfloat16) if kitchen is None else with_kitchen(kitchen, file, exact)
    if kind.rounds_inputs:
        for module in network.modules():
            if isinstance(module, ScaledLinear | KitchenLinear):
                module.register_forward_pre_hook(lambda module, args: (rounded(args[0], kitchen),))
    return network


def with_kitchen(kitchen: ByKitchen, file: Path, exact: HeliosTransformer) -> HeliosTransformer:
    network = HeliosTransformer(CONFIG, dtype=torch.bfloat16)
    network.load_state_dict(exact.state_dict())

    def layer(name: str, linear: nn.Linear) -> nn.Module:
        weight = kitchen.pack(exact.get_parameter(f"{name}.weight")).to(dtype=torch.bfloat16)
        return KitchenLinear(weight, linear.bias)

    replace_layers(network, open_checkpoint(file).quantised, layer)
    return network.eval().requires_grad_(False)


def rounded(x: Tensor, kitchen: ByKitchen | None) -> Tensor:
    """As ComfyUI rounds what it multiplies in a format; in fp8 without a scale, cut off at the largest value."""
    if kitchen is not None:
        return kitchen.pack(x.flatten(0, -2)).dequantize().view_as(x)
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def forward(network: HeliosTransformer) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    latents, past = (torch.randn(1, 16, frames, *LATENTS, generator=rng) for frames in (9, 19))
    anchor, text = torch.randn(1, 16, 1, *LATENTS, generator=rng), torch.randn(1, TEXT_LENGTH, 512, generator=rng)
    history = Memory(past, anchor).history().to(network.dtype)
    return network(latents.to(network.dtype), torch.tensor([500.0]), text.to(network.dtype), history).float()


def chunks(network: HeliosTransformer) -> Tensor:
    """Latents of two chunks."""
    rng = torch.Generator().manual_seed(2)
    bind = bind_transformer(network, SCHEDULE, torch.randn(1, TEXT_LENGTH, 512, generator=rng))
    video = generate(bind, Run(SCHEDULE, Memory.empty(1, *LATENTS), 2, rng))
    return torch.cat([chunk.latents for chunk in video], dim=2)


def rows(turns: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        source = write_weights(Path(folder) / "fp32.safetensors")
        files = {kind: made(kind, source, Path(folder)) for kind in FORMATS}
        exact = load_transformer(source, torch.float32)
        half = loaded(BF16, files[BF16], exact)
        wanted = [make(exact) for make in (forward, chunks)]
        for kind, file in files.items():
            network = exact if kind == FP32 else loaded(kind, file, exact)
            errors = [mean_error(make(network), found) for make, found in zip((forward, chunks), wanted, strict=True)]
            took = in_turns(partial(forward, network), partial(forward, half), turns) if kind.timed else None
            yield {
                "format": kind.name,
                "disk": file.stat().st_size,
                "memory": file.stat().st_size if kind.kitchen else memory(kind, network),
                "forward_error": errors[0],
                "chunks_error": errors[1],
                "seconds": took and took[0],
                "bf16_seconds": took and took[1],
            }


def memory(kind: Format, network: HeliosTransformer) -> int:
    """Bytes of the weights, as hosts keep them."""
    if kind.dtype == torch.float8_e4m3fn:
        network = HeliosTransformer(CONFIG, dtype=kind.dtype, device="meta")
    return sum(x.nbytes for x in network.state_dict().values())


def table(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| format | on disk | in memory | error of a forward | of two chunks | seconds a forward, beside bf16 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in measured:
        times = "" if row["seconds"] is None else f"{row['seconds']:.2f}, {row['bf16_seconds']:.2f}"
        lines.append(
            f"| {row['format']} | {row['disk'] / 1e6:.0f} MB | {row['memory'] / 1e6:.0f} MB | "
            f"{100 * row['forward_error']:.2f} % | {100 * row['chunks_error']:.2f} % | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    measured = list(rows(parser.parse_args().turns))
    text, where = table(measured), machine()
    about = f"{where['processor']}, {where['threads']} threads, PyTorch {where['torch']}, commit {where['commit']}."
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": where, "rows": measured}, indent=2) + "\n", encoding="utf-8")
    TABLE.write_text(f"{text}\n\n{about}\n", encoding="utf-8")
    print(f"{text}\n\n{about}")


if __name__ == "__main__":
    main()
