"""Make one small .safetensors file of a Helios transformer: official fp32 weights -> bf16, fp16 or less, for good."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where the Python of ComfyUI's portable build does not look
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from output_file import check_target, check_unused, replacing, run
from quantisers import QUANTISERS, Quantiser, planned_parts

from helios_core.checkpoint import CONFIG_KEY, VARIANT_KEY, Checkpoint, open_checkpoint, published_name, target_dtypes
from helios_core.config import Variant
from helios_core.quantised import FULL_PRECISION, METADATA_KEY, metadata_text
from helios_core.regular_file import CheckpointError
from helios_core.safetensors_file import DTYPES, read_tensors

CHOICES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}
FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "I8", torch.uint8: "U8"}
KEPT_AT_EITHER_END = 3  # blocks


@dataclass(frozen=True)
class Layout:
    """A safetensors file before it is written: its header and where each tensor's bytes go."""

    header: bytes
    offsets: dict[str, int]  # from the start of the file
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    quantised: Collection[str]  # layers
    size: int  # bytes of the whole file

    def fits(self, name: str, tensor: Tensor) -> bool:
        return (tensor.dtype, tuple(tensor.shape)) == (self.dtypes[name], self.shapes[name])


@dataclass(frozen=True)
class Quantising:
    """What is to be quantised, and how. keep: numbers of blocks, from the end below 0, and parts of layers' names."""

    quant: str = "fp8_scaled"  # one of QUANTISERS
    keep: Sequence[str] | None = None  # None: the first and the last blocks
    full_precision: bool = False  # hosts are asked not to multiply in the format

    @property
    def quantiser(self) -> Quantiser:
        return QUANTISERS[self.quant]


@dataclass(frozen=True)
class LayerError:
    """What rounding a layer's matrix did to it."""

    layer: str
    error: float  # root of the mean square, as a fraction of the matrix's own


def quantised_layers(checkpoint: Checkpoint, quantising: Quantising) -> list[str]:
    """The matrices of the blocks but for those that are kept. Raises CheckpointError where that is none of them."""
    weights = target_dtypes(checkpoint.config, torch.float8_e4m3fn)  # by which the matrices of the blocks tell
    layers = [name.removesuffix(".weight") for name, dtype in weights.items() if dtype == torch.float8_e4m3fn]
    count = checkpoint.config.num_layers
    numbers = {str(i): i for i in range(count)} | {str(i - count): i for i in range(count)}
    ends = [str(i) for i in range(count) if i < KEPT_AT_EITHER_END or i >= count - KEPT_AT_EITHER_END]
    for kept in ends if quantising.keep is None else quantising.keep:
        part = f"blocks.{numbers[kept]}." if kept in numbers else kept
        if quantising.keep is not None and not any(part in layer for layer in weights):
            raise CheckpointError(
                f"--keep {kept}: there is no such thing in a model of {count} blocks. Give numbers of blocks, from the "
                "end as -1, or parts of layers' names, such as attn2.to_out."
            )
        layers = [layer for layer in layers if part not in layer]
    if not layers:
        why = "--keep names all of it"
        if quantising.keep is None:
            why = f"without --keep the first {KEPT_AT_EITHER_END} and the last {KEPT_AT_EITHER_END} blocks stay in full"
        raise CheckpointError(
            f"Nothing of a model of {count} blocks is left to quantise: {why}. "
            "Name fewer, or give --keep without a value to quantise every block."
        )
    return layers


def lay_out(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    variant: Variant | None,
    quantising: Quantising | None,
) -> Layout:
    """Plan the file. Tensors of wide types go first, so that each lies on a multiple of its own element size."""
    dtypes = target_dtypes(checkpoint.config, dtype)
    shapes = {name: checkpoint.tensors[name].shape for name in dtypes}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(checkpoint.config.to_dict())}
    if variant is not None:
        metadata[VARIANT_KEY] = variant
    quantised = {}
    if quantising is not None:
        more = {FULL_PRECISION: True} if quantising.full_precision else {}
        for layer in quantised_layers(checkpoint, quantising):
            rows, columns = shapes[f"{layer}.weight"]
            settings = quantising.quantiser.settings(columns)
            quantised[layer] = settings | more
            for part, kind in planned_parts(quantising.quantiser, settings, rows, columns).items():
                dtypes[f"{layer}.{part}"], shapes[f"{layer}.{part}"] = kind
        metadata[METADATA_KEY] = metadata_text(quantised)
    header: dict[str, object] = {"__metadata__": metadata}
    relative: dict[str, int] = {}
    end = 0
    for name in sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name)):
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        relative[name] = start
        place = [start, end]
        header[published_name(name)] = {
            "dtype": FORMAT_NAMES[dtypes[name]],
            "shape": shapes[name],
            "data_offsets": place,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    packed = len(text).to_bytes(8, "little") + text
    offsets = {name: len(packed) + start for name, start in relative.items()}
    return Layout(packed, offsets, dtypes, shapes, quantised.keys(), len(packed) + end)


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    quantising: Quantising | None = None,
    *,
    variant: Variant | None = None,
    force: bool = False,
) -> str:
    """Write `source` (what `open_checkpoint` reads, unquantised) to the file `target` and say in a line what was made.

    Holds no more than two tensors. `target` appears when it is complete, and never on an error (CheckpointError,
    OSError). `variant` is needed only where the source does not tell it.
    """
    check_target(target, force)
    if quantising is not None:
        check_unused(report_beside(target), force)
    checkpoint = open_checkpoint(source)
    if variant and checkpoint.variant and variant != checkpoint.variant:
        raise CheckpointError(f"{source} says that it is {checkpoint.variant}, not {variant}. Leave --variant out.")
    variant = checkpoint.variant or variant
    if target.exists() and any(target.samefile(tensor.file) for tensor in checkpoint.tensors.values()):
        raise CheckpointError(f"{target} is itself read for the conversion. Choose another target.")
    if checkpoint.quantised:
        raise CheckpointError(f"{source} is quantised already. Convert the weights that it was made from.")
    layout = lay_out(checkpoint, dtype, variant, quantising)
    if (free := shutil.disk_usage(target.parent).free) < layout.size:
        raise CheckpointError(
            f"{target.parent} has {free / 1e9:.2f} GB free, the file needs {layout.size / 1e9:.2f} GB. "
            "Make room, or choose a target on another disk."
        )
    with replacing(target) as partial:
        errors = write(checkpoint, layout, quantising, partial)
    said = variant or "variant unknown, see --variant"
    made = f"{target}: {layout.size / 1e9:.2f} GB, {len(layout.offsets)} tensors, {said}"
    return made if quantising is None else f"{made}; {write_report(target, quantising.quant, errors)}"


def write(checkpoint: Checkpoint, layout: Layout, quantising: Quantising | None, target: Path) -> list[LayerError]:
    errors = []
    with (
        target.open("wb") as stream,
        tqdm(total=layout.size, unit="B", unit_scale=True, unit_divisor=1000, desc=checkpoint.path.name) as bar,
    ):

        def put(name: str, tensor: Tensor) -> None:
            stream.seek(layout.offsets[name])
            bar.update(stream.write(raw_bytes(tensor)))

        def read_as(name: str) -> torch.dtype:
            return torch.float32 if name.removesuffix(".weight") in layout.quantised else layout.dtypes[name]

        bar.update(stream.write(layout.header))
        for name, tensor in read_tensors(checkpoint.tensors, read_as):
            if quantising is None or (layer := name.removesuffix(".weight")) not in layout.quantised:
                put(name, tensor)
                continue
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise CheckpointError(f"{checkpoint.path} has NaN or infinity in {name}. Download it again.")
            parts, error = quantising.quantiser.make(tensor)
            made = {f"{layer}.{part}": values for part, values in parts.items()}
            planned = {f"{layer}.{part}" for part in quantising.quantiser.parts}
            if made.keys() != planned or not all(layout.fits(*part) for part in made.items()):
                raise CheckpointError(
                    f"This version of comfy-kitchen makes something else of {layer} than what ComfyUI 0.33 reads. "
                    "Install comfy-kitchen 0.2.31, or use fp8_scaled."
                )
            for part in made.items():
                put(*part)
            errors.append(LayerError(layer, error))
        stream.flush()
        os.fsync(stream.fileno())  # a power cut after the rename must not leave a file of zeros
    return errors


def report_beside(target: Path) -> Path:
    return target.with_suffix(".report.txt")


def write_report(target: Path, quant: str, errors: Collection[LayerError]) -> str:
    """Write what quantising did to each layer beside the target, the worst first, and say in a line what that was."""
    worst = sorted(errors, key=lambda x: -x.error)
    file = report_beside(target)
    lines = [f"{x.error:.5f}  {x.layer}" for x in worst]
    title = f"{len(worst)} matrices of {target.name} in {quant}: root mean square error as a fraction of the matrix"
    file.write_text("\n".join([title, "error    layer", *lines]) + "\n", encoding="utf-8")
    middle = worst[len(worst) // 2].error
    return (
        f"{len(worst)} matrices in {quant}, with an error of {100 * middle:.2f} % and at most "
        f"{100 * worst[0].error:.2f} % ({worst[0].layer}); of each: {file}"
    )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied. numpy has no bfloat16 or float8, hence by way of uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn a Helios transformer into one .safetensors file of half the size or less, for the node "
        "HeliosModelLoader. Time embedder, modulation tables and layer norms stay fp32; configuration and variant go "
        "into the file's metadata.",
        epilog="example: python scripts/convert_checkpoint.py models/diffusers/Helios-Distilled "
        "models/diffusion_models/helios_distilled_bf16.safetensors",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="folder of an official repository (its transformer/ is read, transformer_ode/ never), a transformer's own "
        "folder, or a .safetensors file in diffusers' or ComfyUI's key layout",
    )
    parser.add_argument("target", type=Path, help="the .safetensors file to make; put it into models/diffusion_models")
    parser.add_argument(
        "--dtype", choices=CHOICES, default="bf16", help="type of the matrices (default: bf16; fp8 loses quality)"
    )
    parser.add_argument(
        "--quant",
        choices=QUANTISERS,
        help="hold the blocks' matrices in this, and all else in --dtype; what that did to each goes into a report "
        "beside the target. fp8_scaled: float8_e4m3fn with a scale each, for every ComfyUI. For ComfyUI from 0.33 on, "
        "whose Python it needs: int8, as large and closer to the original; w4a8 and nvfp4, a third smaller",
    )
    parser.add_argument(
        "--keep",
        nargs="*",
        help="with --quant: what of the blocks stays in --dtype, as numbers of blocks (-1 is the last) or parts of "
        f"layers' names; default: the first {KEPT_AT_EITHER_END} and the last {KEPT_AT_EITHER_END} blocks",
    )
    parser.add_argument(
        "--full-precision",
        action="store_true",
        help="with fp8_scaled and nvfp4: let newer ComfyUI multiply in bf16 even where the card could in the format, "
        "which is slower and closer to the original",
    )
    parser.add_argument(
        "--variant", choices=get_args(Variant), help="which Helios it is; needed only where the source does not tell"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target, and its report, if they exist")
    args = parser.parse_args(argv)
    if args.quant is None and (args.keep is not None or args.full_precision):
        parser.error("--keep and --full-precision go with --quant")
    if args.full_precision and args.quant in ("int8", "w4a8"):
        parser.error(f"--full-precision: ComfyUI multiplies {args.quant} in int8 whatever a file says")
    if args.quant is not None and args.dtype == "fp8_e4m3fn":
        parser.error("with --quant, --dtype is that of what stays unquantised: bf16 or fp16")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    dtype, quantising = CHOICES[args.dtype], None
    if args.quant is not None:
        quantising = Quantising(args.quant, None if args.keep is None else tuple(args.keep), args.full_precision)
    return run(lambda: convert(args.source, args.target, dtype, quantising, variant=args.variant, force=args.force))


if __name__ == "__main__":
    raise SystemExit(main())
