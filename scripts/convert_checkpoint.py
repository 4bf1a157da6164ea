"""Make one small .safetensors file of a Helios transformer: official fp32 weights -> bf16, fp16 or fp8, for good."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helios_core.checkpoint import CONFIG_KEY, VARIANT_KEY, Checkpoint, open_checkpoint, published_name, target_dtypes
from helios_core.config import Variant
from helios_core.regular_file import CheckpointError
from helios_core.safetensors_file import DTYPES, read_tensors

CHOICES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}
FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """A safetensors file before it is written: its header and where each tensor's bytes go."""

    header: bytes
    offsets: dict[str, int]  # from the start of the file
    dtypes: dict[str, torch.dtype]
    size: int  # bytes of the whole file


def lay_out(checkpoint: Checkpoint, dtype: torch.dtype, variant: Variant | None) -> Layout:
    """Plan the file. Tensors of wide types go first, so that each lies on a multiple of its own element size."""
    dtypes = target_dtypes(checkpoint.config, dtype)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(checkpoint.config.to_dict())}
    if variant is not None:
        metadata[VARIANT_KEY] = variant
    header: dict[str, object] = {"__metadata__": metadata}
    relative: dict[str, int] = {}
    end = 0
    for name in sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name)):
        shape = checkpoint.tensors[name].shape
        start, end = end, end + torch.Size(shape).numel() * dtypes[name].itemsize
        relative[name] = start
        place = [start, end]
        header[published_name(name)] = {"dtype": FORMAT_NAMES[dtypes[name]], "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    packed = len(text).to_bytes(8, "little") + text
    return Layout(packed, {name: len(packed) + start for name, start in relative.items()}, dtypes, len(packed) + end)


def convert(
    source: Path, target: Path, dtype: torch.dtype, *, variant: Variant | None = None, force: bool = False
) -> str:
    """Write `source` (whatever `open_checkpoint` reads) to the file `target` and say in a line what was made.

    Holds no more than two tensors. `target` appears when it is complete, and never on an error (CheckpointError,
    OSError). `variant` is needed only where the source does not tell it.
    """
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target} must end in .safetensors, or ComfyUI does not list it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"The folder {target.parent} does not exist. Make it, or choose another target.")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists. Choose another name, or overwrite it with --force.")
    checkpoint = open_checkpoint(source)
    if variant and checkpoint.variant and variant != checkpoint.variant:
        raise CheckpointError(f"{source} says that it is {checkpoint.variant}, not {variant}. Leave --variant out.")
    variant = checkpoint.variant or variant
    if target.exists() and any(target.samefile(tensor.file) for tensor in checkpoint.tensors.values()):
        raise CheckpointError(f"{target} is itself read for the conversion. Choose another target.")
    layout = lay_out(checkpoint, dtype, variant)
    if (free := shutil.disk_usage(target.parent).free) < layout.size:
        raise CheckpointError(
            f"{target.parent} has {free / 1e9:.2f} GB free, the file needs {layout.size / 1e9:.2f} GB. "
            "Make room, or choose a target on another disk."
        )
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write(checkpoint, layout, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    said = variant or "variant unknown, see --variant"
    return f"{target}: {layout.size / 1e9:.2f} GB, {len(layout.offsets)} tensors, {said}"


def write(checkpoint: Checkpoint, layout: Layout, target: Path) -> None:
    with (
        target.open("wb") as stream,
        tqdm(total=layout.size, unit="B", unit_scale=True, unit_divisor=1000, desc=checkpoint.path.name) as bar,
    ):
        bar.update(stream.write(layout.header))
        for name, tensor in read_tensors(checkpoint.tensors, layout.dtypes.__getitem__):
            stream.seek(layout.offsets[name])
            bar.update(stream.write(raw_bytes(tensor)))
        stream.flush()
        os.fsync(stream.fileno())  # a power cut after the rename must not leave a file of zeros


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
        "--variant", choices=get_args(Variant), help="which Helios it is; needed only where the source does not tell"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target if it exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(convert(args.source, args.target, CHOICES[args.dtype], variant=args.variant, force=args.force))
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
